"""`selfsight <job> key=value …`: finds the job, composes its configuration from the words, runs it.

Light on imports: `selfsight --help` loads neither torch nor Hydra.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from selfsight.composition.catalogue import GROUPS, JOBS, POSITIONAL, choices, conf_dir, help_text, job_help
from selfsight.composition.keys import ASIDE
from selfsight.composition.overrides import checked, compose, group_choice, quoted
from selfsight.errors import USAGE, UserError, nearest
from selfsight.runs.processes import INTERRUPTED, TASK_VARIABLE, first_has_ended, on_first_process

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["GROUPS", "JOBS", "checked", "choices", "compose", "conf_dir", "group_choice", "main", "run", "sweep"]


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run(words)
    except KeyboardInterrupt:
        if on_first_process():
            print("selfsight: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not on_first_process() and first_has_ended():  # and has said why; here it is the same, or only the end of it
            sys.exit(1)
        if not isinstance(error, UserError):
            raise
        print(f"selfsight: {error}", file=sys.stderr)
        sys.exit(error.status)


def run(words: list[str]) -> None:
    if TASK_VARIABLE in os.environ:
        from selfsight.jobs.launch import given_task, start

        start(*given_task())
        return None
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return None
    if words[0] == "--version":
        from selfsight import __version__

        print(__version__)
        return None
    job, overrides = words[0], words[1:]
    if job not in JOBS:
        raise UserError(f"there is no job '{job}'; the jobs are {', '.join(JOBS)}.{nearest(job, JOBS)}", status=USAGE)
    if any(word in ("-h", "--help") for word in overrides):
        print(job_help(job), end="")
        return None
    if job in POSITIONAL and (folders := [word for word in overrides if "=" not in word and not word.startswith("-")]):
        listed = ",".join(quoted(folder) for folder in folders)
        overrides = [*(word for word in overrides if word not in folders), f"{POSITIONAL[job]}=[{listed}]"]
    many = any(word in ("-m", "--multirun") for word in overrides)
    overrides = [word for word in overrides if word not in ("-m", "--multirun")]
    if flags := [word for word in overrides if word.startswith("-")]:
        raise UserError(
            f"'{flags[0]}' is no option; options are -m and --help, everything else is key=value.", status=USAGE
        )
    overrides = checked(job, overrides, sweep=many)
    if many:
        return sweep(job, overrides)
    from selfsight.jobs.launch import start

    start(job, compose(job, overrides))
    return None


def sweep(job: str, overrides: list[str]) -> None:
    """Every combination, one run after the other or as SLURM jobs (hydra/launcher=submitit_slurm).

    Raises:
        UserError: some of them failed; the others have run.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra  # hydra.main would keep what became of each of them to itself
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from selfsight.jobs.launch import run_nested_job

    def task(cfg: DictConfig) -> str | None:
        words = [word.removeprefix(f"+{ASIDE}") for word in HydraConfig.get().overrides.task]  # as they are typed
        try:
            run_nested_job(job, cfg, words)
        except UserError as error:
            print(f"selfsight: {error}", file=sys.stderr)
            return str(error)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        return None

    version.setbase("1.3")
    GlobalHydra.instance().clear()
    engine = Hydra.create_main_hydra2(job, create_config_search_path(str(conf_dir())))
    try:
        batches = engine.multirun(job, task, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split()), status=USAGE) from None
    finally:
        GlobalHydra.instance().clear()
    done = [(list(one.overrides), one.return_value) for batch in batches for one in batch]
    common = set.intersection(*(set(words) for words, _ in done))
    failed = [(" ".join(word for word in words if word not in common), said) for words, said in done if said]
    if failed:
        lines = "".join(f"\n  {words}: {said}" for words, said in failed)
        raise UserError(f"{len(failed)} of {len(done)} combinations failed:{lines}")


if __name__ == "__main__":
    main()
