"""Sets of uint8 images, in memory or in files, and what a data set is: some of them with a name."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from selfsight.errors import UserError, nearest
from torch import Tensor

from .decode import read_image

log = logging.getLogger("selfsight")


class ImageSet:
    """A numbered set of images.

    Attributes:
        labels: ``[N]`` int64, -1 where an image has none; None when no image has one.
        pixels: ``[N, 3, H, W]`` uint8 when the set lies in memory, else None.
    """

    labels: Tensor | None
    pixels: Tensor | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """Image ``index`` as ``[H, W, 3]`` uint8 RGB; raises `decode.Unreadable` for a file that is none."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What the image is called: its path below the root, or its number."""
        return str(index)

    def digest(self, index: int) -> bytes:
        """Hash of the content: equal for equal images of one kind of storage."""
        raise NotImplementedError

    def select(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        return SomeImages(self, torch.as_tensor(indices, dtype=torch.int64))


class ArrayImages(ImageSet):
    """Images in memory: ``pixels [N, 3, H, W]`` uint8."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        assert labels is None or len(labels) == len(pixels)
        self.pixels: Tensor = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[index].numpy().transpose(1, 2, 0))

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(self.pixels[index].numpy().tobytes(), digest_size=16).digest()

    def select(self, indices: Tensor | Sequence[int]) -> ArrayImages:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ArrayImages(self.pixels[chosen], None if self.labels is None else self.labels[chosen])


class FileImages(ImageSet):
    """Images in files below ``root``, decoded when read."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor | None = None) -> None:
        assert labels is None or len(labels) == len(paths)
        self.root = root
        # One array of bytes: worker processes then share a million names instead of copying them one by one.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def path(self, index: int) -> Path:
        return self.root / self.name(index)

    def read(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(self.path(index).read_bytes(), digest_size=16).digest()

    def select(self, indices: Tensor | Sequence[int]) -> FileImages:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return FileImages(self.root, [self.name(i) for i in chosen.tolist()], labels)


class SomeImages(ImageSet):
    """Images ``indices`` of another set."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self.images, self.indices = images, indices
        self.labels = None if images.labels is None else images.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def digest(self, index: int) -> bytes:
        return self.images.digest(int(self.indices[index]))


class JoinedImages(ImageSet):
    """Several sets one after the other; images of a set without labels have -1."""

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.labels = None
        if any(part.labels is not None for part in self.parts):
            none = [torch.full((len(part),), -1) if part.labels is None else part.labels for part in self.parts]
            self.labels = torch.cat(none)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[ImageSet, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def read(self, index: int) -> np.ndarray:
        part, inside = self._at(index)
        return part.read(inside)

    def name(self, index: int) -> str:
        part, inside = self._at(index)
        return part.name(inside)

    def digest(self, index: int) -> bytes:
        part, inside = self._at(index)
        return part.digest(inside)


def join(*sets: ImageSet | None) -> ImageSet:
    """The given sets as one; in memory when all of them are and their images are of one size."""
    parts = [images for images in sets if images is not None and len(images)]
    if len(parts) == 1:
        return parts[0]
    joined = JoinedImages(parts)
    pixels = [part.pixels for part in parts if part.pixels is not None]
    if len(pixels) == len(parts) and len({p.shape[1:] for p in pixels}) == 1:
        return ArrayImages(torch.cat(pixels), joined.labels)
    return joined


class UnreadableFiles:
    """Files that turned out to be no images: counted, named in a file, tolerated up to ``share`` of the set."""

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"dataset.max_unreadable is {share}; it is a share of the files, from 0 to 1.")
        self.share = share
        self.reasons: dict[str, str] = {}
        self.path: Path | None = None

    def __len__(self) -> int:
        return len(self.reasons)

    def write_to(self, path: Path) -> None:
        """Name the files in ``path``: those met so far and those to come. Nothing is written while there are none."""
        self.path = path
        for name, reason in self.reasons.items():
            self._append(name, reason)

    def add(self, name: str, reason: str, images: int) -> None:
        """Note one file of a set of ``images``; raises `UserError` when they are more than the tolerated share."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        self._append(name, reason)
        if len(self) > self.share * images:
            where = f"; all are named in {self.path}" if self.path is not None else ""
            raise UserError(
                f"{len(self)} of {images} files cannot be read as images, the last one '{name}' ({reason}){where}: "
                f"remove them, or tolerate more with dataset.max_unreadable (now {self.share:g})."
            )

    def _append(self, name: str, reason: str) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{reason}\n")


@dataclass
class ImageData:
    """A data set: what is learned from, what is held out, and how its images are presented to a network.

    Attributes:
        name: short name for logs and tables.
        train: images to learn from; their labels may be None.
        test: held-out images, or None.
        unlabelled: further images without labels, or None.
        classes: names of the classes by label; empty without labels.
        image_size: side of the square images evaluation sees (and default side of views), pixels.
        mean, std: of the RGB channels, images in [0, 1].
        eval_resize: shorter side before the central square of ``image_size`` is cut out for evaluation; None:
            ``image_size`` itself.
        unreadable: files that cannot be read, which are skipped.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unlabelled: ImageSet | None = None
    eval_resize: int | None = None
    unreadable: UnreadableFiles = field(default_factory=lambda: UnreadableFiles(0.0))

    def __post_init__(self) -> None:
        self.classes = tuple(self.classes)
        self.mean, self.std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        if self.image_size < 1:
            raise UserError(f"dataset.image_size is {self.image_size}; it has to be at least 1 pixel.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("dataset.mean and dataset.std have to hold three values each, those of std above 0.")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> ImageSet:
        """The images called ``train``, ``test`` or ``unlabelled``.

        Raises:
            UserError: another name, or a part this data set does not have.
        """
        parts = {"train": self.train, "test": self.test, "unlabelled": self.unlabelled}
        if name not in parts:
            raise UserError(f"'{name}' is no part of a data set; one of {', '.join(parts)}.{nearest(name, parts)}")
        images = parts[name]
        if images is None:
            raise UserError(f"data set '{self.name}' has no {name} images.")
        return images

    def everything(self) -> ImageSet:
        """All images one may learn from: labelled and unlabelled ones."""
        return join(self.train, self.unlabelled)


def duplicates(first: ImageSet, second: ImageSet) -> int:
    """How many images of ``first`` are also in ``second``, by a hash of their content."""
    known = {second.digest(i) for i in range(len(second))}
    return sum(first.digest(i) in known for i in range(len(first)))
