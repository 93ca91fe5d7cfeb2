"""How a job begins, as a command or inside another one: what can be refused without data is refused before."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfsight import plugins
from selfsight.composition.catalogue import JOBS
from selfsight.composition.keys import flat_keys
from selfsight.composition.overrides import AUTO
from selfsight.composition.places import check_places
from selfsight.engine import options
from selfsight.engine.job_process import Task, run_in_subprocess
from selfsight.engine.options import RunOptions, TrainerOptions
from selfsight.engine.resume import OTHER_RUNS, check_job, check_named, finished, with_run_of_name
from selfsight.errors import USAGE, UserError
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import RUN_VARIABLE
from selfsight.trust import Trust, targets, trusting

if TYPE_CHECKING:
    from selfsight.engine.outcome import Outcome

#: keys that say where a job starts from, which may be `last`
SOURCES = (*OTHER_RUNS, "resume")


def start(job: str, cfg: DictConfig) -> Outcome | None:
    """Run a job with its configuration; what can be refused without data is refused here.

    Returns:
        Its headline figures, of a job that has some.

    Raises:
        UserError: a value is missing or cannot be meant, or a run of another job is to go on.
    """
    try:
        with trusting(trust_of(cfg)):
            typed, cfg = cfg, check(job, cfg)
            plugins.load()
            if cfg.get("resume") == AUTO:
                cfg = with_run_of_name(job, cfg, typed)
                if cfg.resume is not None and (done := finished(cfg)) is not None:
                    return done
            run = module_of(job).run
            from selfsight.runs.console import quiet  # what is refused does without these libraries

            quiet()
            outcome: Outcome | None = run(cfg)
            return outcome
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration is not complete: {' '.join(str(error).split())}.", status=USAGE) from error


def module_of(job: str) -> ModuleType:
    return importlib.import_module(f"selfsight.jobs.{JOBS[job][0]}")


def check(job: str, cfg: DictConfig) -> DictConfig:
    """Refuse what can be refused at once: this imports nothing large.

    Args:
        cfg: final, or as Hydra has composed it.

    Returns:
        The configuration with `last` as a path.

    Raises:
        UserError: a value is missing or cannot be meant, a place is not there, or a run of another job is to go on.
    """
    with trusting(trust_of(cfg)):
        cfg = with_last_run(cfg)
        if cfg.get("resume") in (None, AUTO):
            check_beginning(job, cfg)
        else:
            check_job(RunFolder.open(cfg.resume), job)
            RunOptions.read(cfg)
    return cfg


def check_beginning(job: str, cfg: DictConfig) -> None:
    """Refuse what a job cannot begin with.

    Raises:
        UserError: a value is missing or cannot be meant, or a place is not there.
    """
    check_given(cfg)
    options.check(job, cfg)
    named = [cfg[key] for key in ("run", "teacher") if cfg.get(key) is not None]
    for path in [*named, *(cfg.runs if job == "compare-runs" else ())]:
        RunFolder.open(path)
    check_places(job, cfg)
    check_named(cfg)


def trust_of(cfg: DictConfig) -> Trust:
    """Whom a command trusts: what it names itself, and with ``trust=true`` any folder that it reads."""
    return Trust(bool(cfg.get("trust", False)), targets(OmegaConf.to_container(cfg)))


def with_last_run(cfg: DictConfig) -> DictConfig:
    """A configuration in which `last` is a path: it may be another run by the time that this is read again."""
    named = [key for key in SOURCES if OmegaConf.select(cfg, key, throw_on_missing=False) == "last"]
    if named:
        cfg = cfg.copy()
        for key in named:
            cfg[key] = str(RunFolder.open("last", cfg.get("runs") or "runs").path)
    return cfg


def check_given(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a value that has to be given is not.
    """

    def holder(key: str) -> DictConfig:
        return OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg

    # OmegaConf.missing_keys would resolve references to a data set that only the job will fill in.
    if missing := sorted(key for key in flat_keys(cfg) if OmegaConf.is_missing(holder(key), key.rpartition(".")[2])):
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=VALUE.", status=USAGE)


# --- a job inside another command ------------------------------------------------------------------------------------


def run_nested_job(job: str, cfg: DictConfig, words: Sequence[str] | None = None) -> Outcome | None:
    """Run a job of a sweep, of a comparison, or one that follows from another.

    Where it is spread over devices it is a process of its own: only so can Lightning start it again for each of them,
    and a process that was spread before stays part of what it was.

    Args:
        words: its own words, which the run keeps as its command; None: those of the command it is part of.

    Returns:
        Its headline figures.
    """
    import torch.distributed as dist

    from selfsight.engine import devices

    resumed = cfg.get("resume")
    node = cfg.get("trainer") if resumed in (None, AUTO) else RunFolder.open(resumed).config().trainer
    spread = False
    if node is not None:
        trainer = TrainerOptions.read(node)
        spread = devices.processes(trainer, devices.device(trainer.accelerator, strict=False)) > 1
    argv = sys.argv if words is None else [sys.argv[0], job, *words]
    if spread or dist.is_initialized():
        return run_in_subprocess(job, cfg, argv[1:])
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


def do_given_task() -> Outcome | None:
    """What another process has started this one for, see `engine.job_process`."""
    task = Task.given()
    with trusting(task.trust):
        outcome = start(task.job, task.cfg)
    task.write(outcome)
    return outcome
