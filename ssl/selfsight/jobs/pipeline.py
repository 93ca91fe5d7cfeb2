"""Jobs that follow from one another: each has a folder of its own, and one that was stopped goes on where it stood."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.composition.catalogue import conf_dir
from selfsight.composition.keys import flat_keys
from selfsight.composition.overrides import checked, compose
from selfsight.datamodules import DataModule
from selfsight.datamodules.datasets.splits import chosen_labels
from selfsight.engine.measure import Outcome, headline
from selfsight.evaluation.base import Figures
from selfsight.jobs.launch import run_nested_job
from selfsight.runs.folder import RunFolder

#: the key under which a job is told which run it starts from
SOURCE = {"pretrain": "init_from", "finetune": "run", "distill": "teacher"}


def perform(job: str, words: Sequence[str], folder: Path, settings: Mapping[str, object]) -> Figures:
    """The summary of a job's run in ``folder``: done now, gone on with, or found finished there.

    Args:
        words: as on the command line.
        settings: further keys of the configuration, set after the words.
    """
    run = RunFolder(folder)
    if run.summary.is_file():
        return run.read_summary()
    if run.checkpoint.is_file():
        cfg = composed(job, [f"resume={folder}"])
    else:
        shutil.rmtree(folder, ignore_errors=True)  # begun, and stopped before the first checkpoint
        cfg = composed(job, words, {**settings, "runs": str(folder.parent), "name": folder.name})
    run_nested_job(job, cfg)
    return run.read_summary()


def composed(job: str, words: Sequence[str], settings: Mapping[str, object] | None = None) -> DictConfig:
    """The configuration of a job from words and, set after them, further keys.

    Raises:
        UserError: naming a wrong word.
    """
    cfg = compose(job, checked(job, words, sweep=False))
    OmegaConf.set_struct(cfg, False)
    for key, value in (settings or {}).items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def check(cfg: DictConfig, data: DataModule) -> None:
    """Refuse labels that the steps of ``cfg.then`` would refuse later.

    Raises:
        UserError: see `chosen_labels`.
    """
    if "then" in cfg:
        labels: Any = OmegaConf.to_container(cfg.labels, resolve=True)
        chosen_labels(data.data.train, labels, data.data.classes)


def follow(cfg: DictConfig, folder: RunFolder) -> Outcome:
    """The steps that ``cfg.then`` names, each from the run before it, in folders inside the run's folder.

    Returns:
        Headline figures of the last of them.
    """
    source, summary = folder.path, folder.read_summary()
    for name, step in cfg.then.items():
        previous = source
        settings = {
            "seed": cfg.seed,
            "labels": cfg.labels,
            "trainer.accelerator": cfg.trainer.accelerator,
            "limit_images": cfg.get("limit_images"),
        }
        if not any(word.startswith("debug=") for word in step.words):
            settings |= shrunk(cfg)
        source = folder.path / str(name)
        summary = perform(step.job, step.words, source, {SOURCE[step.job]: str(previous), **settings})
    return Outcome(headline(summary), folder)


def shrunk(cfg: DictConfig) -> dict[str, object]:
    """The values of the choice of ``debug`` that the run was made with, by key: its steps are to be as short."""
    if cfg.get("debug") is None:
        return {}
    debug = OmegaConf.load(conf_dir() / "debug" / f"{cfg.debug}.yaml")
    found = {key: OmegaConf.select(debug, key) for key in flat_keys(debug)}
    return {key: value for key, value in found.items() if not isinstance(value, DictConfig)}
