"""What is learned from: data sets by name, views of their images, and batches of them.

    data = folder("photos")
    for batch in ImageDataModule(data, views("simclr", data.image_size)).train_dataloader(): ...

Names are found when they are asked for, so that what needs no torch, such as `datasets.checks`, comes without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from selfsight.compat import moved

if TYPE_CHECKING:
    from selfsight.datamodules.datasets.dataset import ImageData as ImageData
    from selfsight.datamodules.datasets.folders import folder as folder
    from selfsight.datamodules.datasets.fractals import fractals as fractals
    from selfsight.datamodules.datasets.sources import cifar10 as cifar10
    from selfsight.datamodules.datasets.sources import cifar100 as cifar100
    from selfsight.datamodules.datasets.sources import digits as digits
    from selfsight.datamodules.datasets.sources import fashion_mnist as fashion_mnist
    from selfsight.datamodules.datasets.sources import imagenet as imagenet
    from selfsight.datamodules.datasets.sources import imagenet100 as imagenet100
    from selfsight.datamodules.datasets.sources import imagenette as imagenette
    from selfsight.datamodules.datasets.sources import shapes as shapes
    from selfsight.datamodules.datasets.sources import stl10 as stl10
    from selfsight.datamodules.datasets.sources import svhn as svhn
    from selfsight.datamodules.datasets.splits import LabelSplit as LabelSplit
    from selfsight.datamodules.datasets.splits import hide_labels as hide_labels
    from selfsight.datamodules.datasets.splits import select_labels as select_labels
    from selfsight.datamodules.images.sets import ArrayImages as ArrayImages
    from selfsight.datamodules.images.sets import FileImages as FileImages
    from selfsight.datamodules.images.sets import ImageSet as ImageSet
    from selfsight.datamodules.images.sets import join as join
    from selfsight.datamodules.module import ImageDataModule as ImageDataModule
    from selfsight.datamodules.semi import DataModule as DataModule
    from selfsight.datamodules.semi import DistillationDataModule as DistillationDataModule
    from selfsight.datamodules.semi import LabelledDataModule as LabelledDataModule
    from selfsight.datamodules.semi import SemiDataModule as SemiDataModule

#: module: the names it holds
_HOMES = {
    "datasets.dataset": ("ImageData",),
    "datasets.folders": ("folder",),
    "datasets.fractals": ("fractals",),
    "datasets.sources": (
        "cifar10", "cifar100", "digits", "fashion_mnist", "imagenet", "imagenet100", "imagenette", "shapes", "stl10",
        "svhn",
    ),
    "datasets.splits": ("LabelSplit", "hide_labels", "select_labels"),
    "images.sets": ("ArrayImages", "FileImages", "ImageSet", "join"),
    "module": ("ImageDataModule",),
    "semi": ("DataModule", "DistillationDataModule", "LabelledDataModule", "SemiDataModule"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)

_moved = moved(
    __name__,
    {
        **dict.fromkeys(("dataset", "labels", "lists", "preparing", "sources", "splits"), "datasets"),
        **dict.fromkeys(("memory", "prepared"), "images"),
        **dict.fromkeys(("loader", "order", "reader"), "loading"),
    },
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return _moved(name)
