"""Sets of images, in memory or in files: of uint8 RGB, or of the channels and type that a decoder gives them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from selfsight.contracts import Targets
from selfsight.datamodules.images.decode import MAX_PIXELS, Unreadable, read_image
from selfsight.datamodules.images.formats import read_file
from selfsight.datamodules.images.memory import fits_in_memory

#: from the bytes of a file, and the pixels of the largest image that is read, to the image
Decoder = Callable[[bytes, int], np.ndarray]


class ImageSet:
    """A numbered set of images.

    Attributes:
        labels: ``[N]`` int64, -1 where an image has none; None when no image has one.
        targets: several labels or numbers of each image, in place of a class; None where there are none.
        pixels: ``[N, 3, H, W]`` uint8 (see above) when the images lie in memory and are of one size, else None.
        in_memory: whether `read` decodes nothing.
    """

    labels: Tensor | None
    targets: Targets | None = None
    pixels: Tensor | None = None
    in_memory = True

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def known(self) -> Tensor | None:
        """``[N]`` bool: images that have a label or targets; None where none has."""
        return known(self.labels, self.targets)

    def read(self, index: int) -> np.ndarray:
        """Image ``index`` as ``[H, W, 3]`` uint8 RGB (see above); raises `decode.Unreadable` where it is none."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What the image is called: its path below the root, or its number."""
        return str(index)

    def file(self, index: int) -> Path | None:
        """The file that image ``index`` is, or was decoded from, where it is one of its own."""
        return None

    def stored_size(self, index: int) -> int | None:
        """Bytes of the file that image ``index`` is, of which `digest` is the hash; None where it is no file."""
        return None

    def addresses(self, top: Path) -> list[str]:
        """Where the images are from: the paths of their files as seen from ``top``, or their names."""
        return [self.name(index) for index in range(len(self))]

    def select(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        some = self._select(chosen)
        some.labels, some.targets = taken(self.labels, chosen), taken(self.targets, chosen)
        return some

    def _select(self, chosen: Tensor) -> ImageSet:
        """`select` without labels and targets."""
        return SomeImages(self, chosen)

    def glimpse(self, index: int) -> bytes:
        """Size and first row of the pixels: what can be had cheaply, and equal images have in common."""
        image = self.read(index)
        return repr(image.shape).encode() + image[0].tobytes()

    def digest(self, index: int) -> bytes:
        """Hash of the pixels; for a set of files, of the file."""
        return self.digest_of_pixels(index)

    def digest_of_pixels(self, index: int) -> bytes:
        """Hash of the decoded image."""
        image = self.read(index)
        return hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()


class ArrayImages(ImageSet):
    """Images of one size in memory: ``pixels [N, C, H, W]``.

    With ``root`` the names are those of the files below it that they were decoded from.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        names: Sequence[str] | None = None,
        root: Path | None = None,
    ) -> None:
        assert pixels.ndim == 4
        assert labels is None or len(labels) == len(pixels)
        self.pixels: Tensor = pixels
        self.labels = labels
        self.names, self.root = names, root

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[index].numpy().transpose(1, 2, 0))

    def glimpse(self, index: int) -> bytes:
        _, channels, height, width = self.pixels.shape
        return repr((height, width, channels)).encode() + self.pixels[index, :, 0].T.contiguous().numpy().tobytes()

    def name(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]

    def file(self, index: int) -> Path | None:
        return None if self.root is None else self.root / self.name(index)

    def addresses(self, top: Path) -> list[str]:
        return below(top, self.root, super().addresses(top))

    def _select(self, chosen: Tensor) -> ArrayImages:
        names = None if self.names is None else [self.names[i] for i in chosen.tolist()]
        return ArrayImages(self.pixels[chosen], None, names, self.root)


class FileImages(ImageSet):
    """Images in files below ``root``, decoded when read; none of more than ``max_pixels``.

    Args:
        decoder: from the bytes of a file and ``max_pixels`` to the image; None: to ``[H, W, 3]`` uint8 RGB.
    """

    in_memory = False

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Tensor | None = None,
        max_pixels: int = MAX_PIXELS,
        decoder: Decoder | None = None,
    ) -> None:
        assert labels is None or len(labels) == len(paths)
        self.root, self.max_pixels, self.decoder = root, max_pixels, decoder
        # One array of bytes: worker processes then share a million names instead of copying them one by one.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def path(self, index: int) -> Path:
        return self.root / self.name(index)

    def file(self, index: int) -> Path:
        return self.path(index)

    def read(self, index: int) -> np.ndarray:
        if self.decoder is not None:
            return self.decoder(read_file(self.path(index)), self.max_pixels)
        return read_image(self.path(index), self.max_pixels)

    def stored_size(self, index: int) -> int:
        return self.path(index).stat().st_size

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(read_file(self.path(index)), digest_size=16).digest()

    def addresses(self, top: Path) -> list[str]:
        return below(top, self.root, super().addresses(top))

    def _select(self, chosen: Tensor) -> FileImages:
        names = [self.name(i) for i in chosen.tolist()]
        return FileImages(self.root, names, None, self.max_pixels, self.decoder)


class DecodedImages(ImageSet):
    """Images of several sizes in memory: one run of bytes, which worker processes share.

    With ``root`` the names are those of the files below it that they were decoded from.
    """

    def __init__(
        self, images: Sequence[np.ndarray], labels: Tensor | None, names: Sequence[str], root: Path | None = None
    ) -> None:
        self.shapes = [image.shape for image in images]
        self._starts = np.concatenate([[0], np.cumsum([image.size for image in images])])
        self._bytes = np.concatenate([image.reshape(-1) for image in images])
        self.labels, self.names, self.root = labels, names, root

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> np.ndarray:
        return self._bytes[self._starts[index] : self._starts[index + 1]].reshape(self.shapes[index])

    def name(self, index: int) -> str:
        return self.names[index]

    def file(self, index: int) -> Path | None:
        return None if self.root is None else self.root / self.name(index)

    def addresses(self, top: Path) -> list[str]:
        return below(top, self.root, super().addresses(top))


class GoneImages(ImageSet):
    """Images that were there when a run began and are no more: they keep their places, and cannot be read."""

    in_memory = False

    def __init__(self, names: Sequence[str], labels: Tensor | None = None) -> None:
        self.names, self.labels = names, labels

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        raise Unreadable(GONE)

    def name(self, index: int) -> str:
        return self.names[index]


GONE = "gone since the run began"


class SomeImages(ImageSet):
    """Images ``indices`` of another set."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self.images, self.indices = images, indices
        self.labels, self.targets = taken(images.labels, indices), taken(images.targets, indices)
        self.in_memory = images.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def file(self, index: int) -> Path | None:
        return self.images.file(int(self.indices[index]))

    def stored_size(self, index: int) -> int | None:
        return self.images.stored_size(int(self.indices[index]))

    def digest(self, index: int) -> bytes:
        return self.images.digest(int(self.indices[index]))

    def addresses(self, top: Path) -> list[str]:
        every = self.images.addresses(top)
        return [every[index] for index in self.indices.tolist()]


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
        if there := [part.targets for part in self.parts if part.targets is not None]:
            unknown = there[0].unknown
            self.targets = Targets.joined([unknown(len(p)) if p.targets is None else p.targets for p in self.parts])

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

    def file(self, index: int) -> Path | None:
        part, inside = self._at(index)
        return part.file(inside)

    def stored_size(self, index: int) -> int | None:
        part, inside = self._at(index)
        return part.stored_size(inside)

    def digest(self, index: int) -> bytes:
        part, inside = self._at(index)
        return part.digest(inside)

    def addresses(self, top: Path) -> list[str]:
        return [address for part in self.parts for address in part.addresses(top)]


def below(top: Path, root: Path | None, names: list[str]) -> list[str]:
    """Names below ``root`` as paths seen from ``top``; without ``root`` as they are."""
    above = os.curdir if root is None else os.path.relpath(root, top)
    return names if above == os.curdir else [above + os.sep + name for name in names]


Known = TypeVar("Known", Tensor, Targets)


def taken(known: Known | None, indices: Tensor) -> Known | None:
    """Labels or targets of some images, where there are any."""
    return None if known is None else known[indices]


def known(labels: Tensor | None, targets: Targets | None) -> Tensor | None:
    """``[N]`` bool: images that have a label or targets; None where none has."""
    if targets is not None:
        return targets.known
    return None if labels is None else labels >= 0


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
    together = ArrayImages(torch.cat(pixels), joined.labels)
    together.targets = joined.targets
    return together
