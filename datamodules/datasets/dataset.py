"""`ImageData`: what a data set is; the files of it that cannot be read, and the ones that are kept in memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from selfsight.datamodules.datasets.checks import channels
from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.memory import fits_in_memory
from selfsight.datamodules.images.prepared import ShardImages
from selfsight.datamodules.images.sets import ArrayImages, DecodedImages, FileImages, ImageSet, join, taken
from selfsight.errors import UserError, nearest
from selfsight.validation import AUTO_SWITCH, SHARE, expect, whole

log = logging.getLogger("selfsight")

T = TypeVar("T")


class UnreadableFiles:
    """Files that turned out to be no images: counted, named in a file, tolerated up to a share of all files."""

    def __init__(self, share: float, files: int = 0) -> None:
        self.share, self.files = expect("dataset.max_unreadable", share, SHARE), files
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
            raise self._refusal(f"{len(self)} of {self.files}", new)

    def add_sample(self, found: Mapping[str, str], looked_at: int) -> None:
        """Refuse, by a sample of ``looked_at`` files, images most of which cannot be read; else note them."""
        if len(found) > max(0.5, self.share) * looked_at:
            raise self._refusal(f"{len(found)} of a sample of {looked_at}", found)
        self.add(found.items())

    def _refusal(self, count: str, found: Mapping[str, str]) -> UserError:
        name, reason = next(iter(found.items()))
        where = f" (all are named in {self.report})" if self.report is not None else ""
        return UserError(
            f"{count} files cannot be read as images, such as '{name}' ({reason}){where}: "
            f"remove them, or tolerate a larger share with dataset.max_unreadable (now {self.share:g})."
        )

    def _write(self, found: Iterable[tuple[str, str]]) -> None:
        if self.report is None:
            return
        # Earlier processes of a resumed run, and the other processes of this one, may have named them already. Names
        # are written as the bytes that they are: not all are text.
        known = self.report.read_bytes().splitlines() if self.report.exists() else []
        lines = [line for name, reason in found if (line := os.fsencode(name) + f"\t{reason}".encode()) not in known]
        if lines:
            with self.report.open("ab") as file:
                file.writelines(line + b"\n" for line in lines)


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
        about_labels: where the labels of a folder are from, or why there are none.

    Raises:
        UserError: a value that cannot be worked with, or a single class.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    unlabelled: ImageSet | None = None
    eval_resize: int | None = None
    unreadable: UnreadableFiles = field(default_factory=lambda: UnreadableFiles(0.0))
    prepared: dict[str, Any] | None = None
    about_labels: str = ""

    def __post_init__(self) -> None:
        self._leaks: int | None = None
        self._joined: tuple[ImageSet, ImageSet | None, weakref.ref[ImageSet]] | None = None
        self.classes = tuple(self.classes)
        self.image_size = expect("dataset.image_size", self.image_size, whole(1))
        self.mean = channels("dataset.mean", self.mean)
        self.std = channels("dataset.std", self.std, positive=True)
        if self.eval_resize is not None and expect("dataset.eval_resize", self.eval_resize, whole(1)) < self.image_size:
            raise UserError(
                f"dataset.eval_resize is {self.eval_resize}, smaller than dataset.image_size={self.image_size}; "
                "choose at least that."
            )
        check_classes(self.name, self.classes)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_images(self) -> int:
        """Images one may learn from."""
        return len(self.train) + (0 if self.unlabelled is None else len(self.unlabelled))

    @property
    def held_out(self) -> bool:
        """Whether there are test images."""
        return self.test is not None and len(self.test) > 0

    @property
    def labelled(self) -> bool:
        """Whether accuracies can be measured: training and test images have labels."""
        return all(
            part is not None and part.labels is not None and bool((part.labels >= 0).any())
            for part in (self.train, self.test)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What does not depend on how the images are batched, see `ImageDataModule.facts`."""
        return {
            "num_classes": self.num_classes,
            "classes": self.classes,
            "num_images": self.num_images,
            "image_size": self.image_size,
        }

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
        n = expect("limit_images", n, whole(1))

        def some(images: ImageSet | None) -> ImageSet | None:
            if images is None or len(images) <= n:
                return images
            return images.select(torch.linspace(0, len(images) - 1, n).long())

        train = some(self.train)
        assert train is not None
        return replace(self, train=train, test=some(self.test), unlabelled=some(self.unlabelled))

    def everything(self) -> ImageSet:
        """All images one may learn from: `train` and `unlabelled`. The same set as long as somebody has it."""
        train, unlabelled, joined = self._joined or (None, None, lambda: None)
        images = joined() if train is self.train and unlabelled is self.unlabelled else None
        if images is None:
            images = join(self.train, self.unlabelled)
            self._joined = self.train, self.unlabelled, weakref.ref(images)
        return images

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


def check_classes(name: str, classes: Sequence[str]) -> None:
    """Refuse labels that are all the same."""
    if len(classes) == 1:
        raise UserError(
            f"all images of '{name}' that have a label are of one class, '{classes[0]}', and telling classes apart "
            "takes two: label images of another one, or set dataset.labels=none."
        )


def duplicates(first: ImageSet, second: ImageSet) -> int:
    """How many images of ``first`` are in ``second`` too, by a hash of their content.

    Where all of them lie in files, or were decoded from some, the files are compared, else the pixels.
    """
    files = [[images.file(i) for i in range(len(images))] for images in (first, second)]
    ones, others = ([file for file in part if file is not None] for part in files)
    if len(ones) == len(first) and len(others) == len(second):
        return _shared(ones, others, lambda file: file.stat().st_size, lambda file: _digest(file.read_bytes()))
    left, right = ([(images, i) for i in range(len(images))] for images in (first, second))
    return _shared(left, right, lambda one: one[0].glimpse(one[1]), lambda one: ImageSet.digest(*one))


def _shared(
    ones: Sequence[T], others: Sequence[T], glimpse: Callable[[T], Hashable], digest: Callable[[T], Hashable]
) -> int:
    """How many of ``ones`` are among ``others``. Only those that agree at a glance are looked at closely."""

    def looked_at(items: Iterable[T], look: Callable[[T], Hashable]) -> Iterator[tuple[T, Hashable]]:
        for item in items:
            with contextlib.suppress(Unreadable, OSError):
                yield item, look(item)

    glimpses = [list(looked_at(items, glimpse)) for items in (ones, others)]
    common = {seen for _, seen in glimpses[0]} & {seen for _, seen in glimpses[1]}
    left, right = ([item for item, seen in part if seen in common] for part in glimpses)
    known = {seen for _, seen in looked_at(right, digest)}
    return sum(seen in known for _, seen in looked_at(left, digest))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def keep_in_memory(images: FileImages | ShardImages, resident: bool | str, bad: UnreadableFiles) -> ImageSet:
    """The same images decoded once and for all, where asked for and where they fit.

    ``resident`` is True, False, or ``auto``: when they take less than `SMALL` bytes. Files that cannot be read are left
    out and noted in ``bad``. Images of one size become `ArrayImages`.

    Raises:
        UserError: another word for ``resident``, or too many unreadable files.
    """
    expect("dataset.resident", resident, AUTO_SWITCH)
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
    root = images.root if isinstance(images, FileImages) else None
    if len({array.shape for array in arrays}) == 1:
        return ArrayImages(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels, names, root)
    return DecodedImages(arrays, labels, names, root) if arrays else images.select([])


#: bytes of decoded images that are kept in memory without being asked
SMALL = 2**28


def _try_to_read(images: ImageSet, index: int) -> np.ndarray | str:
    try:
        return images.read(index)
    except Unreadable as reason:
        return str(reason)
