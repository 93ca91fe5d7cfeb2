"""Going on with a run: one of the job that is asked, and with ``resume=auto`` the same command typed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from selfsight.composition.defaults import stated
from selfsight.composition.overrides import AUTO
from selfsight.engine.options import BY_RULE, FASTEST
from selfsight.errors import USAGE, UserError
from selfsight.runs import records
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import on_first_process

if TYPE_CHECKING:
    from selfsight.engine.outcome import Outcome

#: keys that name the run that a job starts from
OTHER_RUNS = ("run", "init_from", "teacher")
#: keys that say where a run is kept and how it is gone on with, and not what it is
ABOUT_THE_FOLDER = ("name", "runs", "resume", "extend", "trust", "job")
#: what the job itself fills in where it is left open, from the run before
FILLED_IN = ("backbone", "dataset", "views", "method", "labels", "layer", "datamodule")
LEFT_OPEN = ("None", "auto", "last", "???")


def check_job(folder: RunFolder, job: str) -> None:
    """
    Raises:
        UserError: the run is one of another job.
    """
    if folder.job != job:
        raise UserError(
            f"'{folder.path}' is a run of {folder.job}; go on with it: selfsight {folder.job} resume={folder.path}",
            status=USAGE,
        )


def check_named(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a run is to be lengthened or gone on with, and none is named.
    """
    if cfg.get("extend") is not None:
        run = "RUN" if cfg.get("name") is None else Path(cfg.runs) / str(cfg.name)
        raise UserError(
            f"extend={cfg.extend} lengthens a run that is named, each time that it is typed: resume={run} "
            f"extend={cfg.extend}.",
            status=USAGE,
        )
    if cfg.get("resume") == AUTO and cfg.get("name") is None:
        raise UserError("resume=auto goes on with the run of a name, and none is given: name=NAME.", status=USAGE)


def with_run_of_name(job: str, cfg: DictConfig, typed: DictConfig) -> DictConfig:
    """The configuration of ``resume=auto``: to go on with the run of this name, or to begin it where there is none.

    Args:
        typed: the configuration before anything was filled in.

    Raises:
        UserError: the run is one of another job, or was begun with other values.
    """
    cfg = cfg.copy()
    cfg.resume = None
    folder = RunFolder(Path(cfg.runs).expanduser() / str(cfg.name))
    if not folder.has_config:
        return cfg
    check_job(folder, job)
    if on_first_process():
        refuse_other_values(typed, folder)
    if on_first_process() or folder.began:  # the others follow the first one, which may have made the folder just now
        cfg.resume = str(folder.path)
    return cfg


def refuse_other_values(cfg: DictConfig, folder: RunFolder) -> None:
    """
    Raises:
        UserError: a value that the run was not begun with; names both.
    """
    asked, of_run = flat_texts(cfg), flat_texts(folder.config())
    by_rule = chosen_by_rule(cfg)
    keys = [key for key in {**asked, **of_run} if (key in asked and key in of_run) or key.endswith("._target_")]
    for key in sorted(keys, key=lambda key: not key.startswith("choices.")):  # as they stand, choices first
        here, there = asked.get(key, "nothing"), of_run.get(key, "nothing")
        first = key.partition(".")[0]
        open_here = here in LEFT_OPEN or not any(name.startswith(f"{first}.") for name in asked)
        if first in ABOUT_THE_FOLDER or "${" in here or (first in FILLED_IN and open_here) or key in by_rule:
            continue
        if key.endswith("._target_"):  # it may have moved since
            same = here.rpartition(".")[2] == there.rpartition(".")[2]
        else:
            follows = (key in OTHER_RUNS and here == "last") or (key == "trainer.precision" and here == FASTEST)
            same = here == there or follows
        if not same:
            shown = key.removeprefix("choices.")
            longer = key == "trainer.max_epochs" and here.isdecimal() and there.isdecimal() and int(here) > int(there)
            further = f", or lengthen it: resume={folder.path} extend={int(here) - int(there)}" if longer else ""
            raise UserError(
                f"'{folder.path}' was begun with {shown}={there}, and {shown}={here} is asked for; leave it as it was, "
                f"or give another name={further}.",
                status=USAGE,
            )


def chosen_by_rule(cfg: DictConfig) -> set[str]:
    """The keys of a run that its number of images decided, and no word: see `engine.sizes.by_rule`."""
    keys = {key for key in BY_RULE if OmegaConf.select(cfg, key) == "auto"}
    if OmegaConf.select(cfg, "choices.recipe") == "small":
        said = stated(cfg.method)
        keys |= {f"method.{name}" for name in cfg.method if name not in said}
    return keys


def flat_texts(cfg: DictConfig) -> dict[str, str]:
    """Every value of a configuration as text, by its dotted key."""
    return {key: str(value) for key, value in records.flat(OmegaConf.to_container(cfg))}


def finished(cfg: DictConfig) -> Outcome | None:
    """What the run ``cfg.resume`` has come to, which is said; None where there is something left to do."""
    folder = RunFolder(Path(cfg.resume))
    if not folder.summary.is_file() or "then" in folder.config():
        return None
    from selfsight.engine.outcome import outcome

    if on_first_process():
        further = f"; resume={folder.path} extend=10 gives it ten epochs more" if "extend" in cfg else ""
        print(f"'{folder.path}' is finished{further}.")
    return outcome(folder, folder.read_summary())
