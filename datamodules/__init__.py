"""What is learned from: data sets by name, views of their images, and batches of them.

data = folder(root="photos", image_size=224, ...)
for batch in ImageDataModule(data, views, batch_size=256, ...).train_dataloader(): ...
"""

from selfsight.datamodules.datasets.dataset import ImageData
from selfsight.datamodules.datasets.folders import folder
from selfsight.datamodules.datasets.sources import (
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    imagenet,
    imagenet100,
    imagenette,
    shapes,
    stl10,
    svhn,
)
from selfsight.datamodules.datasets.splits import LabelSplit, hide_labels, select_labels
from selfsight.datamodules.images.sets import ArrayImages, FileImages, ImageSet, join
from selfsight.datamodules.module import ImageDataModule
from selfsight.datamodules.semi import DistillationDataModule, LabelledDataModule, SemiDataModule

#: what a run trains on
DataModule = ImageDataModule | SemiDataModule

__all__ = [
    "ArrayImages",
    "DataModule",
    "DistillationDataModule",
    "FileImages",
    "ImageData",
    "ImageDataModule",
    "ImageSet",
    "LabelSplit",
    "LabelledDataModule",
    "SemiDataModule",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "folder",
    "hide_labels",
    "imagenet",
    "imagenet100",
    "imagenette",
    "join",
    "select_labels",
    "shapes",
    "stl10",
    "svhn",
]
