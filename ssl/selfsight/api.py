"""selfsight in Python: what the command line does, with objects in place of folders.

import selfsight as ss

run = ss.pretrain(method="swav", dataset="folder", root="photos", backbone="resnet50", epochs=100)
run.knn()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from selfsight.checkpoints.load import described, load
from selfsight.composition.keywords import words_of
from selfsight.composition.overrides import compose
from selfsight.datamodules import DataModule, ImageSet, join
from selfsight.datamodules import folder as folder_of_images
from selfsight.datamodules.images.bands import Kind
from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.formats import read_file
from selfsight.engine import build, measure
from selfsight.engine.outcome import headline
from selfsight.engine.reload import (
    LoadedRun,
    eval_datamodule,
    feature_cache,
    head_of,
    loaded_run,
    trained_method,
)
from selfsight.errors import UserError, nearest
from selfsight.evaluation import KNN, Features, LinearProbe
from selfsight.evaluation.base import Figures
from selfsight.evaluation.features import FINAL
from selfsight.jobs.launch import run_nested_job, trust_of
from selfsight.methods.base import Method
from selfsight.reporting import embedding, embedding_map, report
from selfsight.runs.folder import RunFolder
from selfsight.trust import NOBODY, Trust, given, trusting

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

Split = Literal["train", "test", "unlabelled"]


def pretrain(**settings: object) -> Run:
    """Learn a backbone from images; `selfsight pretrain` in Python::

        run = pretrain(method="swav", dataset="folder", root="photos", epochs=100, **{"optimizer.lr": 0.3})

    Args:
        settings: groups by their choices (``method="swav"``, ``debug="smoke"``), keys of the configuration by their
            values (``batch_size=64``, ``**{"optimizer.lr": 0.3}``), and the short words of `SHORT` (``root``,
            ``epochs``, ``lr``, …). ``resume="runs/NAME"`` goes on with a run that stopped.

    Returns:
        The finished run.

    Raises:
        UserError: what the command line refuses, in the same sentence.
    """
    return _trained("pretrain", settings)


def finetune(run: Run | str | os.PathLike[str] | None = None, **settings: object) -> Run:
    """Train a pretrained network on few labels; `selfsight finetune` in Python::

        classifier = finetune(run, labels_per_class=4)

    Args:
        run: to start from; None for a network from scratch (``backbone=``, ``dataset=``).
        settings: as for `pretrain`.

    Returns:
        The finished run; its ``summary["classifiers"]`` holds the accuracies.

    Raises:
        UserError: what the command line refuses, in the same sentence.
    """
    with trusting(run.trust if isinstance(run, Run) else NOBODY):
        return _trained("finetune", settings if run is None else {"run": os.fspath(run), **settings})


def embed(
    backbone: nn.Module | Run | str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    stage: str = FINAL,
    image_size: int | None = None,
    batch_size: int = 256,
    num_workers: int | str = "auto",
) -> Features:
    """Features of all images below a folder, with their names::

        features = embed(load("runs/swav-photos-1"), "holiday")  # x [N, D], labels, indices, names

    Args:
        backbone: a network (of `load`, of timm), or where one lies: a run or an exported folder.
        images: a folder; labels come with them where `selfsight.datamodules.folder` finds some.
        stage: of the network, see `selfsight.evaluation.features.staged`.
        image_size: side in pixels; None: what the network was trained with.

    Returns:
        Features of every readable image.

    Raises:
        UserError: no such network, stage or folder, or no images in it.
    """
    if isinstance(backbone, Run):
        net = backbone.backbone
    else:
        net = backbone if isinstance(backbone, nn.Module) else load(os.fspath(backbone))
    if image_size is None:
        image_size = int(described(net, "image_size"))
    data = folder_of_images(os.fspath(images), test_fraction=0.0, image_size=image_size)
    every = join(data.everything(), data.test)
    module = eval_datamodule(replace(data, train=every, test=None, unlabelled=None), net, batch_size, num_workers)
    return _named(measure.features(net, module, stage)[0], every)


class Neighbour(NamedTuple):
    """An image that is like a query.

    Attributes:
        name: of its file, or its number. position: among the training images. similarity: cosine of the features.
    """

    name: str
    position: int
    similarity: float


class Run:
    """A finished run: its numbers, its networks, and what can be asked of them::

        run = Run("runs/swav-photos-1")
        run.knn()["knn_top1"]

    Args:
        path: its folder, or ``last`` for the newest one in ``runs/``.
        trust: build whatever the folder names, or what is trusted beside what `selfsight.trust` knows.

    Attributes:
        folder: its files. trust: whom it trusts; `load`, `finetune` and the like go by it.

    Raises:
        UserError: there is no such run.
    """

    def __init__(self, path: str | os.PathLike[str] = "last", *, trust: bool | Trust = False) -> None:
        self.trust = trust if isinstance(trust, Trust) else Trust(everything=trust)
        with trusting(self.trust):
            self.folder = RunFolder.open(os.fspath(path))

    def __fspath__(self) -> str:
        return str(self.folder.path)

    def __repr__(self) -> str:
        found, named = self.headline, ("knn_top1", "linear_top1", "student_top1")
        figures = [f"{name} {found[name]:.1%}" for name in named if name in found]
        return f"Run({', '.join([repr(str(self.folder.path)), *figures])})"

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.folder.path

    @property
    def config(self) -> DictConfig:
        """What it was made with: every key of its configuration."""
        with trusting(self.trust):
            return self.folder.config()

    @property
    def summary(self) -> dict[str, Any]:
        """What was measured at its end; empty for a run that has not come to it."""
        return self.folder.read_summary()

    @property
    def headline(self) -> dict[str, float]:
        """The figures by which it may be chosen among others: ``knn_top1``, ``linear_top1``, ``student_top1``, …"""
        return headline(self.summary)

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row an epoch: losses, monitors and figures by name."""
        import pandas

        return pandas.DataFrame([{k: _number(v) for k, v in row.items()} for row in self.folder.read_metrics()])

    @cached_property
    def loaded(self) -> LoadedRun:
        """Its parts in memory; read once.

        Raises:
            UserError: it has not come to its end, or a file of it cannot be read.
        """
        with trusting(self.trust):
            return loaded_run(self.folder)

    @property
    def backbone(self) -> nn.Module:
        """The trained backbone, frozen and in eval mode: ``[B, 3, H, W]`` to ``[B, num_features]``."""
        return self.loaded.backbone

    @property
    def method(self) -> Method:
        """The method as its last checkpoint has it, on the CPU.

        Raises:
            UserError: the folder holds no checkpoint.
        """
        with trusting(self.trust):
            return self.loaded.method or trained_method(self.folder, self.loaded.datamodule)

    @cached_property
    def data(self) -> DataModule:
        """Its images, as evaluation presents them to the backbone."""
        with trusting(self.trust):
            return eval_datamodule(build.dataset(self.config, self.folder), self.backbone)

    # --- what can be asked of it -------------------------------------------------------------------------------------

    def embed(self, split: Split = "train", stage: str = FINAL) -> Features:
        """Features of a part of its images, with their names; kept in the run folder for the next time.

        Args:
            split: ``train``, ``test`` or ``unlabelled``.
            stage: ``final``, a module out of the backbone's ``feature_info`` (``layer3``), ``last2``, ``projection``,
                or a vision transformer's class tokens (``token4``, ``token-avg``).

        Raises:
            UserError: there are no such images, or no such stage.
        """
        there = measure.available_splits(self.data)
        if split not in there:
            raise UserError(f"the data of '{self.path}' have no {split} images; there are {', '.join(there)}.")
        with trusting(self.trust):
            head, cache = head_of(stage, self.folder, self.backbone), feature_cache(self.folder)
        found = measure.part_features(self.backbone, self.data, split, [stage], head=head, cache=cache)[stage]
        return _named(found, self.data.data.split(split))

    def knn(self, stage: str = FINAL, **settings: Any) -> Figures:
        """k-nearest-neighbour accuracy of the test images, ``knn_top1`` among others.

        Args:
            settings: those of `selfsight.evaluation.KNN`, such as ``k=[1]``.

        Raises:
            UserError: no labels, no test images, no such stage or setting.
        """
        return self._probed(KNN, stage, settings)

    def linear(self, stage: str = FINAL, **settings: Any) -> Figures:
        """Linear-probe accuracy of the test images, ``linear_top1`` among others.

        Args:
            settings: those of `selfsight.evaluation.LinearProbe`, such as ``folds=5``.

        Raises:
            UserError: no labels, no test images, no such stage or setting.
        """
        return self._probed(LinearProbe, stage, settings)

    def neighbours(self, image: int | str | os.PathLike[str] | np.ndarray | Tensor, k: int = 8) -> list[Neighbour]:
        """The ``k`` training images most like an image, the most like first.

        Args:
            image: a file (from here, or from the root of the data set as `Neighbour.name` has it), an array
                ``[H, W, 3]`` uint8, or the position of a test image (without test images, of a training image).

        Raises:
            UserError: a file that is no image, an array of another form, or a position where there is none.
        """
        train = self.embed("train")
        query = self._at(image) if isinstance(image, int) else self._feature_of(image)
        cosines = (F.normalize(train.x, dim=1) @ F.normalize(query, dim=0)).clamp(-1, 1)  # by rounding a hair beyond
        similarity, index = cosines.topk(min(k, len(train)))
        return [
            Neighbour(train.names[i], int(train.indices[i]), float(s)) for s, i in zip(similarity, index, strict=True)
        ]

    def map(self, split: Split | None = None, projection: str = "tsne") -> plotly.graph_objects.Figure:
        """The embedding in a plane, as a figure of plotly's: a dot an image, coloured by class.

        Args:
            split: whose images; None: the test images, or the training images where there are no others.
            projection: ``tsne``, ``umap`` or ``pca``.

        Raises:
            UserError: no such images, or no such projection.
        """
        split = split or self._shown
        train = self.embed("train")
        shown = train if split == "train" else self.embed(split)
        return embedding_map.figure(
            self.data, embedding.build_map(train, shown, self.data.data.split(split), projection)
        )

    def report(self, projection: str = "tsne") -> Path:
        """Write report.html again.

        Returns:
            Its path.
        """
        with trusting(self.trust):
            return report.write(self.loaded, *measure.features(self.backbone, self.loaded.datamodule), projection)

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> Split:
        return "test" if "test" in measure.available_splits(self.data) else "train"

    def _probed(self, kind: type[KNN | LinearProbe], stage: str, settings: dict[str, Any]) -> Figures:
        known = [field.name for field in fields(kind)]
        for name in (name for name in settings if name not in known):
            raise UserError(f"{kind.__name__} takes no {name}; it takes {', '.join(known)}.{nearest(name, known)}")
        evaluator = kind(**settings)
        measure.check_labels(evaluator, self.data)
        return measure.run_evaluator(evaluator, self.embed("train", stage), self.embed("test", stage))

    def _at(self, position: int) -> Tensor:
        split = self._shown
        known = self.embed(split)
        rows = (known.indices == position).nonzero()  # a file that cannot be read has no features
        if not len(rows):
            last = int(known.indices.max())
            raise UserError(f"there is no {split} image {position}; give a position from 0 to {last}.")
        return known.x[int(rows[0])]

    def _feature_of(self, image: str | os.PathLike[str] | np.ndarray | Tensor) -> Tensor:
        if isinstance(image, (str, os.PathLike)):
            path, root = Path(image).expanduser(), self.data.dataset.root
            if root is not None and not path.exists():
                path = root / path
            try:
                pixels = self.data.dataset.decode(read_file(path))
            except (Unreadable, OSError) as reason:
                raise UserError(f"'{os.fspath(image)}' cannot be read as an image ({reason}).") from None
        else:
            pixels = np.asarray(image)
            bands = self.data.dataset.bands
            expected = Kind(3, "uint8") if bands is None else bands.kind
            if pixels.ndim != 3 or Kind(pixels.shape[2], pixels.dtype.name) != expected:
                raise UserError(
                    f"an array of shape {list(pixels.shape)} and type {pixels.dtype} was given for an image; "
                    f"[H, W, {expected.channels}] {expected.dtype} was expected."
                )
        return measure.feature_of_image(self.backbone, self.data, pixels)


def _trained(job: str, settings: Mapping[str, object]) -> Run:
    words = list(words_of(settings))
    try:
        cfg = compose(job, words)
        outcome = run_nested_job(job, cfg, words)
    except UserError as error:
        raise error.with_traceback(None) from None  # the way it came tells a person nothing
    folder = outcome.folder.path if outcome is not None and outcome.folder is not None else "last"
    with trusting(trust_of(cfg)):
        return Run(folder, trust=given())


def _named(features: Features, images: ImageSet) -> Features:
    return replace(features, names=tuple(images.name(int(i)) for i in features.indices))


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
