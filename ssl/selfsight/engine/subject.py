"""A frozen backbone, of a run or exported, with images that it is to be judged by; what an evaluator says of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from omegaconf import DictConfig
from torch import nn

import selfsight
from selfsight.datamodules import ImageDataModule
from selfsight.engine import build, measure, nodes
from selfsight.engine.devices import device
from selfsight.engine.inherit import chosen_or_inherited, names_something
from selfsight.engine.reload import ALL, eval_datamodule, feature_cache, head_of
from selfsight.errors import UserError
from selfsight.evaluation import base
from selfsight.evaluation.base import Evaluator, Figures
from selfsight.evaluation.features import FINAL, PROJECTION, stage_names
from selfsight.runs.folder import RunFolder, run_or_exported


class Subject(NamedTuple):
    """A frozen backbone, its images, its run, and the data set that was given in place of the run's own."""

    backbone: nn.Module
    data: ImageDataModule
    folder: RunFolder | None
    dataset: DictConfig | None


def subject(cfg: DictConfig) -> Subject:
    """What is measured, on which images: from ``run``, or from ``weights`` and a ``dataset``.

    Values of ``dataset`` alone are those of the run's data set with these in their place.

    Raises:
        UserError: neither or both are given, or a backbone comes without a data set.
    """
    folder, given = run_or_exported(cfg.run, cfg.weights), cfg.get("dataset")
    if folder is None and not names_something(given):
        raise UserError("an exported backbone carries no images; add dataset=NAME.", status=2)
    of_run = given if folder is None else folder.config().dataset
    dataset = of_run if given is None else chosen_or_inherited(given, of_run)
    backbone = selfsight.load(folder.path if folder is not None else cfg.weights).to(device(cfg.accelerator))
    images = nodes.build(dataset)
    images = images if folder is None else build.as_of_run(images, dataset, folder)
    data = eval_datamodule(images, backbone, cfg.batch_size, cfg.num_workers)
    return Subject(backbone, data, folder, dataset if given is not None else None)


def subject_of(folder: RunFolder, accelerator: str) -> Subject:
    """The backbone of a run on the accelerator, and the images that the run is about."""
    backbone = selfsight.load(folder.path).to(device(accelerator))
    return Subject(backbone, eval_datamodule(build.dataset(folder.config(), folder), backbone), folder, None)


def evaluate(evaluator: Evaluator, of: Subject, stage: str, *, cache: bool) -> dict[str, Figures]:
    """Results by stage: of the one asked for, or of every one (``stage=all``) from a single pass over the images."""
    backbone, data, folder, _ = of
    measure.check_labels(evaluator, data)
    head = head_of(stage, folder, backbone)
    if base.looks_at_images(evaluator):  # needs more than features: augmented images, maps
        if stage == ALL:
            raise UserError(f"{type(evaluator).__name__} looks at one stage at a time; give stage=NAME.", status=2)
        if stage != FINAL and not hasattr(evaluator, "stage") and not hasattr(evaluator, "stages"):
            raise UserError(f"{type(evaluator).__name__} looks at the last stage alone; leave stage out.", status=2)
        if hasattr(evaluator, "head"):
            evaluator = dataclasses.replace(evaluator, head=head)  # type: ignore[type-var]
        return {stage: evaluator.on_images(backbone, data)}
    stages = [stage]
    if stage == ALL:
        stages = [*stage_names(backbone), *([PROJECTION] if head else [])]
    pairs = measure.staged_features(backbone, data, stages, head=head, cache=feature_cache(folder, cache))
    return {stage: measure.run_evaluator(evaluator, *pair) for stage, pair in pairs.items()}
