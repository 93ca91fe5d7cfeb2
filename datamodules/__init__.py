"""What is learned from: data sets by name, views of their images, and batches of them.

from selfsight.datamodules import ImageDataModule, folder

data = folder(root="photos", image_size=224, ...)
batches = ImageDataModule(data, views, batch_size=256, ...).train_dataloader()
"""

from .images import ArrayImages, FileImages, ImageData, ImageSet, join
from .module import ImageDataModule
from .sources import digits

__all__ = ["ArrayImages", "FileImages", "ImageData", "ImageDataModule", "ImageSet", "digits", "join"]
