"""selfsight in Python: what the command line does, with objects in place of folders.

import selfsight as ss
run = ss.pretrain(method="swav", dataset="folder", root="photos", backbone="resnet50", epochs=100)
run.knn()
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from selfsight.checkpoints.load import load
from selfsight.composition.catalogue import GROUPS
from selfsight.composition.overrides import checked, compose, quoted
from selfsight.datamodules import DataModule
from selfsight.datamodules import folder as folder_of_images
from selfsight.engine import build, measure
from selfsight.engine.reload import (
    LoadedRun,
    eval_datamodule,
    feature_cache,
    head_of,
    loaded_run,
    trained_method,
)
from selfsight.errors import UserError
from selfsight.evaluation import KNN, Features, LinearProbe
from selfsight.evaluation.base import Figures
from selfsight.evaluation.features import FINAL
from selfsight.jobs.launch import run_nested_job
from selfsight.methods.base import Method
from selfsight.reporting import embedding, embedding_map, report
from selfsight.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

Split = Literal["train", "test", "unlabelled"]

#: short words of Python for keys of the configuration
SHORT = {
    "root": "dataset.root",
    "image_size": "dataset.image_size",
    "epochs": "trainer.max_epochs",
    "lr": "optimizer.lr",
    "devices": "trainer.devices",
    "accelerator": "trainer.accelerator",
    "precision": "trainer.precision",
    "labels_per_class": "labels.per_class",
}


def pretrain(**settings: object) -> Run:
    """Learn a backbone from images; `selfsight pretrain` in Python.

    Args:
        settings: groups by their choices (``method="swav"``, ``dataset="folder"``), keys by their values
            (``batch_size=64``, ``**{"optimizer.lr": 0.3}``), and the short words of `SHORT`.

    Returns:
        The finished run.

    Raises:
        UserError: what the command line refuses.
    """
    return _trained("pretrain", settings)


def finetune(run: Run | str | os.PathLike[str] | None = None, **settings: object) -> Run:
    """Train a pretrained network on few labels; `selfsight finetune` in Python.

    Args:
        run: to start from; None for a network from scratch (``backbone=``, ``dataset=``).
        settings: as for `pretrain`, such as ``labels_per_class=4``.
    """
    return _trained("finetune", settings if run is None else {"run": os.fspath(run), **settings})


def embed(
    backbone: nn.Module | Run | str | os.PathLike[str], images: str | os.PathLike[str], **settings: int
) -> Features:
    """Features of all images below a folder.

    Args:
        backbone: a loaded one, or where one lies: a run or an exported folder.
        images: a folder.
        settings: ``image_size`` (default: what the backbone was trained with), ``batch_size``, ``num_workers``.
    """
    net = backbone if isinstance(backbone, nn.Module) else load(os.fspath(backbone))
    spec: Mapping[str, object] = getattr(net, "spec", {})
    size = settings.pop("image_size", None) or spec.get("image_size", 224)
    data = folder_of_images(os.fspath(images), test_fraction=0.0, image_size=int(str(size)))
    return _named(measure.features(net, eval_datamodule(data, net, **settings))[0], data.split("train"))


class Neighbour(NamedTuple):
    """A training image, its position among them, and how like the query it is (cosine)."""

    name: str
    position: int
    similarity: float


class Run:
    """A finished run: its numbers, its networks, and what can be asked of them.

    Args:
        path: its folder, or ``last`` for the newest one in ``runs/``.

    Raises:
        UserError: there is no such run.
    """

    def __init__(self, path: str | os.PathLike[str] = "last") -> None:
        self.folder = RunFolder.open(os.fspath(path))

    def __fspath__(self) -> str:
        return str(self.folder.path)

    def __repr__(self) -> str:
        found, named = self.headline, ("knn_top1", "linear_top1", "student_top1")
        figures = ", ".join(f"{name} {found[name]:.1%}" for name in named if name in found)
        return f"Run('{self.folder.path}'{', ' if figures else ''}{figures})"

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.folder.path

    @property
    def config(self) -> DictConfig:
        """What it was made with."""
        return self.folder.config()

    @property
    def summary(self) -> dict[str, object]:
        """What was measured at its end."""
        return self.folder.read_summary()

    @property
    def headline(self) -> dict[str, float]:
        """The figures by which it may be chosen among others: ``knn_top1``, ``linear_top1``, ``student_top1``, …"""
        return measure.headline(self.folder.read_summary())

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row an epoch; needs pandas."""
        import pandas

        return pandas.DataFrame([{k: _number(v) for k, v in row.items()} for row in self.folder.read_metrics()])

    @cached_property
    def loaded(self) -> LoadedRun:
        """Its parts in memory."""
        return loaded_run(self.folder)

    @property
    def backbone(self) -> nn.Module:
        """The trained backbone, frozen and in eval mode."""
        return self.loaded.backbone

    @property
    def method(self) -> Method:
        """The method as its last checkpoint has it, on the CPU.

        Raises:
            UserError: the folder holds no checkpoint.
        """
        return self.loaded.method or trained_method(self.folder, self.loaded.datamodule)

    @cached_property
    def data(self) -> DataModule:
        """Its images, as evaluation sees them."""
        return eval_datamodule(build.dataset(self.config, self.folder), self.backbone)

    # --- what can be asked of it -------------------------------------------------------------------------------------

    def embed(self, split: Split = "train", stage: str = FINAL) -> Features:
        """Features of a part of its images, with their names; kept in the run folder for the next time.

        Args:
            split: ``train``, ``test`` or ``unlabelled``. stage: see `selfsight.evaluation.features.staged`.

        Raises:
            UserError: there are no such images, or no such stage.
        """
        there = measure.available_splits(self.data)
        if split not in there:
            raise UserError(f"the data of '{self.path}' have no {split} images; there are {', '.join(there)}.")
        head = head_of(stage, self.folder, self.backbone)
        cache = feature_cache(self.folder)
        found = measure.part_features(self.backbone, self.data, split, [stage], head=head, cache=cache)[stage]
        return _named(found, self.data.data.split(split))

    def knn(self, stage: str = FINAL, **settings: object) -> Figures:
        """k-nearest-neighbour accuracy; ``settings`` are those of `selfsight.evaluation.KNN`."""
        return KNN(**settings)(self.embed("train", stage), self.embed("test", stage))  # type: ignore[arg-type]

    def linear(self, stage: str = FINAL, **settings: object) -> Figures:
        """Linear-probe accuracy; ``settings`` are those of `selfsight.evaluation.LinearProbe`."""
        return LinearProbe(**settings)(self.embed("train", stage), self.embed("test", stage))  # type: ignore[arg-type]

    def neighbours(self, image: int | str | os.PathLike[str] | np.ndarray | Tensor, k: int = 8) -> list[Neighbour]:
        """The ``k`` training images most like an image.

        Args:
            image: a file, ``[H, W, 3]`` uint8, or the position of a test image (without a test set, of a training
                image).
        """
        train = self.embed("train")
        if isinstance(image, int):
            splits: tuple[Split, ...] = ("test", "train")
            query = self.embed(next(split for split in splits if split in measure.available_splits(self.data))).x[image]
        else:
            query = self._feature(image)
        similarity, index = (F.normalize(train.x, dim=1) @ F.normalize(query, dim=0)).topk(min(k, len(train)))
        return [
            Neighbour(train.names[i], int(train.indices[i]), float(s)) for s, i in zip(similarity, index, strict=True)
        ]

    def map(self, split: Split = "test", projection: str = "tsne") -> plotly.graph_objects.Figure:
        """The embedding in a plane: a plotly figure."""
        train, shown = self.embed("train"), self.embed(split)
        known = embedding.build_map(train, shown, self.data.data.split(split), projection)
        return embedding_map.figure(self.data, known)

    def report(self, projection: str = "tsne") -> Path:
        """Write report.html again; its path."""
        return report.write(self.loaded, *measure.features(self.backbone, self.loaded.datamodule), projection)

    def _feature(self, image: str | os.PathLike[str] | np.ndarray | Tensor) -> Tensor:
        from selfsight.datamodules.images.decode import Unreadable, read_image

        if isinstance(image, (np.ndarray, Tensor)):
            pixels = image
        else:
            try:
                pixels = read_image(Path(image))
            except (Unreadable, OSError) as reason:
                raise UserError(f"'{os.fspath(image)}' cannot be read as an image ({reason}).") from None
        return measure.feature_of_image(self.backbone, self.data, np.asarray(pixels))


def _trained(job: str, settings: Mapping[str, object]) -> Run:
    words = [_word(str(key), value) for key, value in settings.items()]
    outcome = run_nested_job(job, compose(job, checked(job, words, sweep=False)), words)
    return Run(outcome.folder.path if outcome is not None and outcome.folder is not None else "last")


def _word(key: str, value: object) -> str:
    """``key=value`` as it is typed: ``optimizer.lr=0.3``."""
    key = SHORT.get(key, key)
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return f"{key}={text if key in GROUPS else quoted(text)}"
    if isinstance(value, (DictConfig, Mapping)):
        value = OmegaConf.to_container(OmegaConf.create(dict(value)), resolve=True)
    if isinstance(value, Sequence):
        value = list(value)
    return f"{key}={json.dumps(value)}"


def _named(features: Features, images: object) -> Features:
    from dataclasses import replace

    return replace(features, names=tuple(images.name(int(i)) for i in features.indices))  # type: ignore[attr-defined]


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
