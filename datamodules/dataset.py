"""`ImageData`: what a data set is; the files of it that cannot be read, and the ones that are kept in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsight.errors import UserError, nearest

from .decode import Unreadable
from .images import ArrayImages, DecodedImages, FileImages, ImageSet, join, taken
from .memory import fits_in_memory
from .prepared import ShardImages

log = logging.getLogger("selfsight")


class UnreadableFiles:
    """Files that turned out to be no images: counted, named in a file, tolerated up to a share of all files."""

    def __init__(self, share: float, files: int = 0) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"dataset.max_unreadable is {share}; it is a share of the files, from 0 to 1.")
        self.share, self.files = share, files
        self.reasons: dict[str, str] = {}
        self.report: Path | None = None

    def __len__(self) -> int:
        return len(self.reasons)

    def write_to(self, report: Path) -> None:
        """Name the files in ``report``: those met so far and those to come. Nothing is written while there are none."""
        self.report = report
        self._write(self.reasons.items())

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Note files by name and reason; raises `UserError` when there are now more than the tolerated share."""
        new = {name: reason for name, reason in found if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        self._write(new.items())
        if len(self) > self.share * self.files or len(self) == self.files:
            name, reason = next(iter(new.items()))
            where = f" (all are named in {self.report})" if self.report is not None else ""
            raise UserError(
                f"{len(self)} of {self.files} files cannot be read as images, such as '{name}' ({reason}){where}: "
                f"remove them, or tolerate a larger share with dataset.max_unreadable (now {self.share:g})."
            )

    def _write(self, found: Iterable[tuple[str, str]]) -> None:
        if self.report is None:
            return
        # Earlier processes of a resumed run, and the other processes of this one, may have named them already.
        known = self.report.read_text(encoding="utf-8").splitlines() if self.report.exists() else []
        lines = [line for name, reason in found if (line := f"{name}\t{reason}") not in known]
        if lines:
            with self.report.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)


@dataclass
class ImageData:
    """A data set: what is learned from, what is held out, and how its images are presented to a network.

    Attributes:
        name: short name for logs and tables.
        train: images to learn from; their labels may be None.
        test: held-out images, or None.
        classes: names of the classes by label; empty without labels.
        image_size: side of the square images evaluation sees (and default side of views), pixels.
        mean, std: of the RGB channels, images in [0, 1].
        unlabelled: further images to learn from, without labels, or None.
        eval_resize: shorter side before the central square of ``image_size`` is cut out for evaluation; None:
            ``image_size`` itself.
        unreadable: files that cannot be read, which are skipped.
        prepared: how the folder was re-encoded, where it was (see `prepared.record`).
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
    prepared: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._leaks: int | None = None
        self.classes = tuple(self.classes)
        self.mean, self.std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        if self.image_size < 1:
            raise UserError(f"dataset.image_size is {self.image_size}; it has to be at least 1 pixel.")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise UserError(
                f"dataset.eval_resize is {self.eval_resize}, smaller than dataset.image_size={self.image_size}; "
                "choose at least that."
            )
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

    def limited(self, n: int) -> ImageData:
        """The same with at most ``n`` images a part, evenly spaced over it: for tries, not for figures."""

        def some(images: ImageSet | None) -> ImageSet | None:
            if images is None or len(images) <= n:
                return images
            return images.select(torch.linspace(0, len(images) - 1, n).long())

        train = some(self.train)
        assert train is not None
        return replace(self, train=train, test=some(self.test), unlabelled=some(self.unlabelled))

    def everything(self) -> ImageSet:
        """All images one may learn from: `train` and `unlabelled`."""
        return join(self.train, self.unlabelled)

    def warn_of_leaks(self) -> int:
        """Number of unlabelled images that are test images too, by content; a warning names it when there are any."""
        if self._leaks is not None:
            return self._leaks
        count = 0 if self.unlabelled is None or self.test is None else duplicates(self.unlabelled, self.test)
        self._leaks = count
        if self.unlabelled is not None and count:
            log.warning(
                f"{count} of the {len(self.unlabelled)} unlabelled images of '{self.name}' are test images too: "
                "figures on the test images will flatter."
            )
        return count


def duplicates(first: ImageSet, second: ImageSet) -> int:
    """How many images of ``first`` are in ``second`` too, by a hash of their content.

    Two sets of files are compared file by file (only files of equal length are read), others pixel by pixel.
    """
    if isinstance(first, FileImages) and isinstance(second, FileImages):
        lengths = [[images.path(i).stat().st_size for i in range(len(images))] for images in (first, second)]
        common = set(lengths[0]) & set(lengths[1])
        known = {second.digest(i) for i, length in enumerate(lengths[1]) if length in common}
        return sum(first.digest(i) in known for i, length in enumerate(lengths[0]) if length in common)
    known = set(_digests(second))
    return sum(digest in known for digest in _digests(first))


def _digests(images: ImageSet) -> Iterable[bytes]:
    for index in range(len(images)):
        try:
            yield ImageSet.digest(images, index)
        except Unreadable:
            continue


def keep_in_memory(images: FileImages | ShardImages, resident: bool | str, bad: UnreadableFiles) -> ImageSet:
    """The same images decoded once and for all, where asked for and where they fit.

    ``resident`` is True, False, or ``auto``: when they take less than `SMALL` bytes. Files that cannot be read are left
    out and noted in ``bad``. Images of one size become `ArrayImages`.
    """
    if resident is False or not len(images):
        return images
    probe = [_try_to_read(images, i) for i in range(0, len(images), max(1, len(images) // 16))]
    sizes = [image.nbytes for image in probe if isinstance(image, np.ndarray)]
    expected = int(np.mean(sizes) * len(images)) if sizes else 0
    if resident == "auto" and (expected > SMALL or isinstance(images, ShardImages)):
        return images
    if not fits_in_memory(2 * expected, f"the decoded images of {images.root}"):
        return images
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda i: _try_to_read(images, i), range(len(images))))
    bad.add((images.name(i), reason) for i, reason in enumerate(read) if isinstance(reason, str))
    kept = [i for i, image in enumerate(read) if isinstance(image, np.ndarray)]
    arrays = [image for image in read if isinstance(image, np.ndarray)]
    names, labels = [images.name(i) for i in kept], taken(images.labels, torch.tensor(kept, dtype=torch.int64))
    if len({array.shape for array in arrays}) == 1:
        return ArrayImages(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels, names)
    return DecodedImages(arrays, labels, names) if arrays else images.select([])


#: bytes of decoded images that are kept in memory without being asked
SMALL = 2**28


def _try_to_read(images: ImageSet, index: int) -> np.ndarray | str:
    try:
        return images.read(index)
    except Unreadable as reason:
        return str(reason)
