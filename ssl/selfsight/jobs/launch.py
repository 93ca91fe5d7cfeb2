"""How a job begins, as a command or inside another one: what can be refused without data is refused before."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from selfsight.composition.catalogue import GROUPS, JOBS, ON_FEATURES, WHOLE_EVALUATION, conf_dir, job_groups
from selfsight.composition.keys import ASIDE, flat_keys
from selfsight.engine import options
from selfsight.engine.options import TrainerOptions
from selfsight.errors import USAGE, UserError
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import INTERRUPTED, RUN_VARIABLE, SPREAD_VARIABLES, TASK_VARIABLE

if TYPE_CHECKING:
    from selfsight.engine.measure import Outcome

#: keys that say where a job starts from, which may be `last`
SOURCES = ("run", "start", "teacher", "resume")


def start(job: str, cfg: DictConfig) -> Outcome | None:
    """Run a job with its configuration; what can be refused without data is refused here.

    Raises:
        UserError: a value is missing or cannot be meant, or a run of another job is to go on.
    """
    with open_dict(cfg):
        for key in [key for key in GROUPS if f"{ASIDE}{key}" in cfg]:
            cfg[key] = cfg.pop(f"{ASIDE}{key}")
        cfg.job = job  # a run folder tells by it how to go on
        for key in SOURCES:  # the run itself may be the last one by the time that this is read again
            if OmegaConf.select(cfg, key, throw_on_missing=False) == "last":
                cfg[key] = str(RunFolder.open("last").path)
        alone_as_whole(job, cfg)
    try:
        if cfg.get("resume") is None:
            check_given(cfg)
            options.check(job, cfg)
        elif (folder := RunFolder.open(cfg.resume)).job != job:
            raise UserError(
                f"'{folder.path}' is a run of {folder.job}; go on with it: selfsight {folder.job} resume={folder.path}",
                status=USAGE,
            )
        outcome: Outcome | None = importlib.import_module(f"selfsight.jobs.{JOBS[job][0]}").run(cfg)
        return outcome
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration is not complete: {' '.join(str(error).split())}.", status=USAGE) from error


def check_given(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a value that has to be given is not.
    """

    def holder(key: str) -> Any:
        return OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg

    # OmegaConf.missing_keys would resolve references to a data set that only the job will fill in.
    if missing := sorted(key for key in flat_keys(cfg) if OmegaConf.is_missing(holder(key), key.rpartition(".")[2])):
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=VALUE.", status=USAGE)


def alone_as_whole(job: str, cfg: DictConfig) -> None:
    """``evaluator=knn`` for a job that evaluates while training and at the end: this one alone, both times."""
    if job_groups(job).get("evaluator") != WHOLE_EVALUATION or "_target_" not in cfg.evaluator:
        return
    files: dict[str, Any] = {name: OmegaConf.load(conf_dir() / "evaluator" / f"{name}.yaml") for name in ON_FEATURES}
    name = next((name for name, file in files.items() if file._target_ == cfg.evaluator._target_), "chosen")
    online: Any = OmegaConf.load(conf_dir() / "evaluator" / f"{WHOLE_EVALUATION}.yaml")
    cfg.evaluator = {
        "online": {**online.online, "evaluators": {name: cfg.evaluator}},
        "final": {name: cfg.evaluator},
    }


# --- a job inside another command ------------------------------------------------------------------------------------


def run_nested_job(job: str, cfg: DictConfig, words: Sequence[str] | None = None) -> Outcome | None:
    """Run a job of a sweep, of a comparison, or one that follows from another.

    Where it is spread over devices it is a process of its own: only so can Lightning start it again for each of them,
    and a process that was spread before stays part of what it was.

    Args:
        words: its own words, which the run keeps as its command; None: those of the command it is part of.
    """
    import torch.distributed as dist

    from selfsight.engine import devices

    resumed = cfg.get("resume")
    node = cfg.get("trainer") if resumed is None else RunFolder.open(resumed).config().trainer
    spread = False
    if node is not None:
        trainer = TrainerOptions.read(node)
        spread = devices.processes(trainer, devices.device(trainer.accelerator, strict=False)) > 1
    argv = sys.argv if words is None else [sys.argv[0], job, *words]
    if spread or dist.is_initialized():
        run_in_subprocess(job, cfg, argv[1:])
        return None
    with as_command(argv):
        return start(job, cfg)


@contextlib.contextmanager
def as_command(argv: list[str]) -> Iterator[None]:
    """This process as if it were one of that command, with a run folder of its own."""
    typed, folder = sys.argv, os.environ.pop(RUN_VARIABLE, None)
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = typed
        os.environ.pop(RUN_VARIABLE, None)
        if folder is not None:
            os.environ[RUN_VARIABLE] = folder


def run_in_subprocess(job: str, cfg: DictConfig, words: Sequence[str]) -> None:
    """Run a job in a process of its own.

    Raises:
        UserError: it did not come to its end; it has said why. SystemExit: it was stopped.
    """
    task = json.dumps([job, OmegaConf.to_container(cfg)])
    environment = {name: value for name, value in os.environ.items() if name not in SPREAD_VARIABLES}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "selfsight.cli", *words],
        env={**environment, TASK_VARIABLE: task},
        stdout=written_to(sys.stdout),
        stderr=written_to(sys.stderr),
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it has heard the same Ctrl-C, and saves
        status = process.wait()
    if status == INTERRUPTED:
        sys.exit(INTERRUPTED)
    if status:
        raise UserError(f"`selfsight {job}` on its devices ended with status {status} and has said why.")


def written_to(stream: Any) -> Any:
    """The file behind a stream, for another process to write to; None, the terminal, where there is none."""
    try:
        stream.fileno()
    except (AttributeError, OSError):
        return None
    return stream


def given_task() -> tuple[str, DictConfig]:
    """What `run_in_subprocess` has left for this process and those that Lightning starts beside it."""
    job, content = json.loads(os.environ[TASK_VARIABLE])
    cfg = OmegaConf.create(content)
    OmegaConf.set_struct(cfg, True)
    return job, cfg
