"""Where `datasets.folders` stood in version 0.1, for scripts that import from here."""

from selfsight.datamodules.datasets.folders import find_images, folder

__all__ = ["find_images", "folder"]
