"""Jobs that follow from one another: each has a folder of its own, and one that was stopped goes on where it stood."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.cli import JOBS, checked, compose
from selfsight.jobs.run_folder import RUN_VARIABLE, RunFolder

#: the key under which a job is told which run it starts from
SOURCE = {"pretrain": "start", "finetune": "run", "distill": "teacher"}


def perform(job: str, words: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a job's run in ``folder``: done now, gone on with, or found finished there.

    Args:
        words: as on the command line.
        settings: further keys of the configuration, set after the words.
    """
    run = RunFolder(folder)
    if run.summary.is_file():
        return run.read_summary()
    cfg = compose(job, checked(job, list(words), sweep=False))
    OmegaConf.set_struct(cfg, False)
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, merge=False)
    if run.checkpoint.is_file():
        cfg.resume = str(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # begun, and stopped before the first checkpoint
        cfg.runs, cfg.name = str(folder.parent), folder.name
    before = os.environ.pop(RUN_VARIABLE, None)
    try:
        importlib.import_module(f"selfsight.jobs.{JOBS[job][0]}").run(cfg)
    finally:
        os.environ.pop(RUN_VARIABLE, None)
        if before is not None:
            os.environ[RUN_VARIABLE] = before
    return run.read_summary()


def follow(cfg: DictConfig, folder: RunFolder) -> None:
    """The steps that ``cfg.then`` names, each from the run before it, in folders inside the run's folder."""
    source = folder.path
    for name, step in cfg.then.items():
        settings = {
            SOURCE[step.job]: str(source),
            "seed": cfg.seed,
            "labels": cfg.labels,
            "trainer.accelerator": cfg.trainer.accelerator,
            "limit_images": cfg.get("limit_images"),
        }
        perform(step.job, step.words, folder.path / str(name), settings)
        source = folder.path / str(name)
