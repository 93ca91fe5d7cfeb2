"""Labelled and unlabelled batches side by side, for semi-supervised methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from lightning import LightningDataModule

from selfsight.contracts import SemiBatch
from selfsight.datamodules.datasets.dataset import ImageData
from selfsight.datamodules.datasets.splits import LabelSplit, chosen_labels, hide_labels
from selfsight.datamodules.loading.loader import Loader
from selfsight.datamodules.loading.reader import RawBatch
from selfsight.datamodules.module import ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError
from selfsight.optim.curriculum import Curriculum
from selfsight.validation import NULL, expect, whole


class SemiDataModule(LightningDataModule):
    """`SemiBatch` es: ``batch_size`` labelled and ``mu * batch_size`` unlabelled images a step.

    The few labelled images come again and again in fresh orders, so that both streams last one epoch. The labels of the
    unlabelled images, where they are known (else -1, or None), come along for the figure that says how many
    pseudo-labels are right; no method learns from them.

    Args:
        data: its training images have labels, most of which are hidden.
        views: by name: ``labelled`` for the labelled images; ``weak`` and ``strong`` (and any further ones) for the
            unlabelled ones, in this order in their batch. A mapping of `View`.
        labels: who keeps labels: a `LabelSplit`, or the arguments of `select_labels`, or ``{"split": FILE}``.
        mu: unlabelled images for each labelled one.
        batch_size: labelled images per step over all processes.
        steps_per_epoch: steps that make an epoch; None: one pass over the unlabelled images.
        include_labelled: the labelled images are among the unlabelled ones, too (USB), or not (ImageNet lists).
        replacement: draw every image independently (SimMatch's CIFAR loaders) instead of pass by pass.
        num_workers, engine, seed, channels_last, compile, device, eval_batch_size: see `ImageDataModule`.

    ``Batch.indices`` of a labelled batch count within the labelled images: 0 .. ``labelled_count`` - 1.

    Attributes:
        dataset: the data set as the split leaves it, see `hide_labels`.
        views: of the unlabelled images.

    Raises:
        UserError: no labels, a view missing, or what `select_labels` and `ImageDataModule` refuse.
    """

    def __init__(
        self,
        data: ImageData,
        views: Mapping[str, View],
        *,
        labels: LabelSplit | Mapping[str, Any],
        mu: int = 7,
        batch_size: int = 64,
        steps_per_epoch: int | None = None,
        include_labelled: bool = True,
        replacement: bool = False,
        num_workers: int | str = "auto",
        engine: str = "auto",
        seed: int = 0,
        channels_last: bool = False,
        compile: bool = False,
        device: torch.device | str | None = None,
        eval_batch_size: int = 512,
    ) -> None:
        super().__init__()
        missing = [name for name in ("labelled", "weak") if name not in views]
        if missing:
            raise UserError(
                f"a semi-supervised run needs the view '{missing[0]}', and views has {', '.join(views) or 'none'}: "
                "choose views that describe labelled, weak and strong."
            )
        expect("mu", mu, whole(1))
        expect("batch_size", batch_size, whole(1))
        expect("steps_per_epoch", steps_per_epoch, NULL | whole(1))
        self.split = chosen_labels(data.train, labels, data.classes)
        data.warn_of_leaks()
        self.dataset, self.batch_size = hide_labels(data, self.split), batch_size
        self.few = replace(self.dataset, unlabelled=None)
        if not include_labelled and self.dataset.unlabelled is None:
            raise UserError("every image keeps its label, so that none is left to learn from without: keep fewer.")
        hidden = data if include_labelled else _without(data, self.split)
        steps = steps_per_epoch or hidden.num_images // (mu * batch_size)
        shared: dict[str, Any] = {
            "num_workers": num_workers, "engine": engine, "replacement": replacement, "channels_last": channels_last,
            "compile": compile, "device": device, "eval_batch_size": eval_batch_size,
        }  # fmt: skip
        several = {name: view for name, view in views.items() if name != "labelled"}
        if steps < 1:
            raise UserError(
                f"a step takes {mu} x {batch_size} unlabelled images and there are {hidden.num_images}: "
                "choose a smaller batch_size, or steps_per_epoch."
            )
        # The reading processes are shared out as the images of a step are.
        self.labelled = ImageDataModule(
            self.few, {"labelled": views["labelled"]}, batch_size=batch_size, examples=steps * batch_size,
            seed=2 * seed, worker_share=Fraction(1, 1 + mu), **shared,
        )  # fmt: skip
        self.unlabelled = ImageDataModule(
            hidden, several, batch_size=mu * batch_size, examples=steps * mu * batch_size, seed=2 * seed + 1,
            worker_share=Fraction(mu, 1 + mu), **shared,
        )  # fmt: skip
        self.views, self.steps_per_epoch = self.unlabelled.views, steps

    @property
    def examples(self) -> int:
        """Labelled images per epoch."""
        return self.labelled.examples

    @property
    def labelled_count(self) -> int:
        return len(self.split)

    @property
    def data(self) -> ImageData:
        """`dataset`, as it was called in version 0.1."""
        return self.dataset

    @property
    def facts(self) -> dict[str, Any]:
        """What a method may ask to be told: `ImageDataModule.facts`, with other counts.

        - ``labels``: ``[N_l]`` int64, class of each labelled image, in the order of ``SemiBatch.labelled.indices``.
        - ``num_unlabelled``: images of the unlabelled stream; ``SemiBatch.unlabelled.indices`` count them.
        """
        counts = {"labels": self.few.train.labels, "num_unlabelled": len(self.unlabelled.images)}
        return {**self.dataset.facts, **counts}

    def follow(self, curriculum: Curriculum | None) -> None:
        """Views of both streams as it has them in each epoch, see `ImageDataModule.follow`."""
        self.labelled.follow(curriculum)
        self.unlabelled.follow(curriculum)

    def train_dataloader(self) -> SemiLoader:
        """`SemiBatch` es for this process; with a trainer, what `on_after_batch_transfer` finishes."""
        for part in (self.labelled, self.unlabelled):
            part.trainer = self.trainer
        return SemiLoader(self.labelled.train_dataloader(), self.unlabelled.train_dataloader())

    def eval_dataloader(self, split: str, limit: int | None = None) -> Loader:
        """As `ImageDataModule.eval_dataloader`; ``train`` are the labelled images."""
        self.labelled.trainer = self.trainer
        return self.labelled.eval_dataloader(split, limit)

    def close(self) -> None:
        """End the processes that read for training."""
        self.labelled.close()
        self.unlabelled.close()

    def teardown(self, stage: str) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """Where the training stands: epoch and batch."""
        return self.unlabelled.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next `train_dataloader` goes on from there."""
        self.labelled.load_state_dict(state)
        self.unlabelled.load_state_dict(state)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, RawSemiBatch):
            return batch
        return SemiBatch(self.labelled.finish(batch.labelled), self.unlabelled.finish(batch.unlabelled))


@dataclass
class RawSemiBatch:
    labelled: RawBatch
    unlabelled: RawBatch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawSemiBatch:
        return RawSemiBatch(self.labelled.to(device, non_blocking), self.unlabelled.to(device, non_blocking))


class SemiLoader:
    """Two loaders of equal length side by side; stopped and taken up again together."""

    def __init__(self, labelled: Loader, unlabelled: Loader) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __len__(self) -> int:
        return len(self.unlabelled)

    @property
    def waited(self) -> float:
        """Seconds, as of `Loader`."""
        return self.labelled.waited + self.unlabelled.waited

    def __iter__(self) -> Iterator[SemiBatch | RawSemiBatch]:
        for labelled, unlabelled in zip(self.labelled, self.unlabelled, strict=True):
            if isinstance(labelled, RawBatch):
                yield RawSemiBatch(labelled, unlabelled)
            else:
                yield SemiBatch(labelled, unlabelled)

    def state_dict(self) -> dict[str, int]:
        return self.unlabelled.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.labelled.load_state_dict(state)
        self.unlabelled.load_state_dict(state)

    def from_epoch(self, epoch: int, batch: int = 0) -> SemiLoader:
        """The next iteration is ``epoch``, from ``batch`` on; returns itself."""
        self.load_state_dict({"epoch": epoch, "batch": batch})
        return self


def _without(data: ImageData, split: LabelSplit) -> ImageData:
    """All images to learn from but those of the split, as the training images of a set."""
    images = data.everything()
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[split.tensor()] = False
    return replace(data, train=images.select(rest.nonzero().flatten()), unlabelled=None)


class LabelledDataModule(ImageDataModule):
    """`Batch` es of the images that keep their labels, for fine-tuning; the others are left out.

    Args:
        labels: see `SemiDataModule`.
        steps_per_epoch: None: as many batches as the labelled images fill, at least one. They come again and again.
        options: see `ImageDataModule`.
    """

    def __init__(
        self,
        data: ImageData,
        views: Sequence[View] | Mapping[str, View],
        *,
        labels: LabelSplit | Mapping[str, Any],
        batch_size: int = 256,
        steps_per_epoch: int | None = None,
        **options: Any,
    ) -> None:
        expect("batch_size", batch_size, whole(1))
        expect("steps_per_epoch", steps_per_epoch, NULL | whole(1))
        self.split = chosen_labels(data.train, labels, data.classes)
        few = replace(hide_labels(data, self.split), unlabelled=None)
        steps = steps_per_epoch or max(1, len(self.split) // batch_size)
        super().__init__(few, views, batch_size=batch_size, examples=steps * batch_size, **options)


class DistillationDataModule(ImageDataModule):
    """`Batch` es of all images, their labels known (not -1) only where the split keeps them.

    Args:
        labels: see `SemiDataModule`. options: see `ImageDataModule`.
    """

    def __init__(
        self,
        data: ImageData,
        views: Sequence[View] | Mapping[str, View],
        *,
        labels: LabelSplit | Mapping[str, Any],
        **options: Any,
    ) -> None:
        self.split = chosen_labels(data.train, labels, data.classes)
        data.warn_of_leaks()
        super().__init__(hide_labels(data, self.split), views, **options)


#: what a run trains on
DataModule = ImageDataModule | SemiDataModule
