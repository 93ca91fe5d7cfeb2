"""What is learned from: data sets by name, views of their images, and batches of them.

data = folder(root="photos", image_size=224, ...)
for batch in ImageDataModule(data, views, batch_size=256, ...).train_dataloader(): ...
"""

from .dataset import ImageData
from .folders import folder
from .images import ArrayImages, FileImages, ImageSet, join
from .module import ImageDataModule
from .semi import DistillationDataModule, LabelledDataModule, SemiDataModule
from .sources import (
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
from .splits import LabelSplit, hide_labels, select_labels

__all__ = [
    "ArrayImages",
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
