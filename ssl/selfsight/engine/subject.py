"""What a job that trains nothing looks at: a frozen backbone, of a run or exported, and images."""

from __future__ import annotations

from typing import NamedTuple

from omegaconf import DictConfig
from torch import nn

import selfsight
from selfsight.datamodules import ImageDataModule
from selfsight.engine import build
from selfsight.engine.devices import device
from selfsight.engine.inherit import chosen_or_inherited, names_something
from selfsight.engine.reload import eval_datamodule
from selfsight.errors import UserError
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
    images = build.build(dataset)
    images = images if folder is None else build.as_of_run(images, dataset, folder)
    data = eval_datamodule(images, backbone, cfg.batch_size, cfg.num_workers)
    return Subject(backbone, data, folder, dataset if given is not None else None)
