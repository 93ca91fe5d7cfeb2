"""Sets of uint8 images, in memory or in files, and `ImageData`: what a data set is."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsight.errors import UserError, nearest

from .decode import Unreadable, read_image

log = logging.getLogger("selfsight")


class ImageSet:
    """A numbered set of images.

    Attributes:
        labels: ``[N]`` int64, -1 where an image has none; None when no image has one.
        pixels: ``[N, 3, H, W]`` uint8 when the images lie in memory and are of one size, else None.
        in_memory: whether `read` decodes nothing.
    """

    labels: Tensor | None
    pixels: Tensor | None = None
    in_memory = True

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """Image ``index`` as ``[H, W, 3]`` uint8 RGB; raises `decode.Unreadable` for a file that is none."""
        raise NotImplementedError

    def path(self, index: int) -> Path | None:
        """The file of an image, if it has one."""
        return None

    def name(self, index: int) -> str:
        """What the image is called: its path below the root, or its number."""
        return str(index)

    def select(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        return SomeImages(self, torch.as_tensor(indices, dtype=torch.int64))

    def digest(self, index: int) -> bytes:
        """Hash of the pixels; for a set of files, of the file."""
        image = self.read(index)
        return hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()


class ArrayImages(ImageSet):
    """Images of one size in memory: ``pixels [N, 3, H, W]`` uint8."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        assert labels is None or len(labels) == len(pixels)
        self.pixels: Tensor = pixels
        self.labels = labels
        self.names = names

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[index].numpy().transpose(1, 2, 0))

    def name(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]

    def select(self, indices: Tensor | Sequence[int]) -> ArrayImages:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        names = None if self.names is None else [self.names[i] for i in chosen.tolist()]
        return ArrayImages(self.pixels[chosen], _taken(self.labels, chosen), names)


class FileImages(ImageSet):
    """Images in files below ``root``, decoded when read."""

    in_memory = False

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
        return FileImages(self.root, [self.name(i) for i in chosen.tolist()], _taken(self.labels, chosen))


class DecodedImages(ImageSet):
    """Images of several sizes in memory: one run of bytes, which worker processes share."""

    def __init__(self, images: Sequence[np.ndarray], labels: Tensor | None, names: Sequence[str]) -> None:
        self.shapes = [image.shape for image in images]
        self._starts = np.concatenate([[0], np.cumsum([image.size for image in images])])
        self._bytes = np.concatenate([image.reshape(-1) for image in images])
        self.labels, self.names = labels, names

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> np.ndarray:
        return self._bytes[self._starts[index] : self._starts[index + 1]].reshape(self.shapes[index])

    def name(self, index: int) -> str:
        return self.names[index]


class SomeImages(ImageSet):
    """Images ``indices`` of another set."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self.images, self.indices = images, indices
        self.labels = _taken(images.labels, indices)
        self.in_memory = images.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.images.read(int(self.indices[index]))

    def path(self, index: int) -> Path | None:
        return self.images.path(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))


class JoinedImages(ImageSet):
    """Several sets one after the other; images of a set without labels have -1."""

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.in_memory = all(part.in_memory for part in self.parts)
        self.labels = None
        if any(part.labels is not None for part in self.parts):
            each = [torch.full((len(part),), -1) if part.labels is None else part.labels for part in self.parts]
            self.labels = torch.cat(each)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[ImageSet, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def read(self, index: int) -> np.ndarray:
        part, inside = self._at(index)
        return part.read(inside)

    def path(self, index: int) -> Path | None:
        part, inside = self._at(index)
        return part.path(inside)

    def name(self, index: int) -> str:
        part, inside = self._at(index)
        return part.name(inside)


def _taken(labels: Tensor | None, indices: Tensor) -> Tensor | None:
    return None if labels is None else labels[indices]


def join(*sets: ImageSet | None) -> ImageSet:
    """The given sets as one; as one tensor when all of them are, their images are of one size, and memory allows."""
    parts = [images for images in sets if images is not None and len(images)]
    if len(parts) == 1:
        return parts[0]
    joined = JoinedImages(parts)
    pixels = [part.pixels for part in parts if part.pixels is not None]
    if len(pixels) < len(parts) or len({p.shape[1:] for p in pixels}) > 1:
        return joined
    if not fits_in_memory(sum(p.nbytes for p in pixels), "the joined images"):
        return joined
    return ArrayImages(torch.cat(pixels), joined.labels)


def keep_in_memory(images: FileImages, resident: bool | str, bad: UnreadableFiles) -> ImageSet:
    """The same images decoded once and for all, where asked for and where they fit.

    ``resident`` is True, False, or ``auto``: when they take less than `SMALL` bytes. Files that cannot be read are left
    out and noted in ``bad``. Images of one size become `ArrayImages`.
    """
    if resident is False or not len(images):
        return images
    probe = [_try_to_read(images, i) for i in range(0, len(images), max(1, len(images) // 16))]
    sizes = [image.nbytes for image in probe if isinstance(image, np.ndarray)]
    expected = int(np.mean(sizes) * len(images)) if sizes else 0
    if resident == "auto" and expected > SMALL:
        return images
    if not fits_in_memory(2 * expected, f"the decoded images of {images.root}"):
        return images
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda i: _try_to_read(images, i), range(len(images))))
    bad.add((images.name(i), reason) for i, reason in enumerate(read) if isinstance(reason, str))
    kept = [i for i, image in enumerate(read) if isinstance(image, np.ndarray)]
    arrays = [image for image in read if isinstance(image, np.ndarray)]
    names, labels = [images.name(i) for i in kept], _taken(images.labels, torch.tensor(kept, dtype=torch.int64))
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


def fits_in_memory(size: int, what: str) -> bool:
    """Whether ``size`` bytes may be taken (four fifths of what is free); says so when not."""
    free = available_memory()
    if free is None or size <= 0.8 * free:
        return True
    log.warning(
        f"{what} would take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: they are read as needed."
    )
    return False


def available_memory() -> int | None:
    """Bytes that a process may still take on this machine and in this container; None where nobody says."""
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # no Linux, no container, or one without a limit
        pass
    return min(limits, default=None)


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
    counts = Counter(_digests(second))
    return sum(digest in counts for digest in _digests(first))


def _digests(images: ImageSet) -> Iterable[bytes]:
    for index in range(len(images)):
        try:
            yield ImageSet.digest(images, index)
        except Unreadable:
            continue
