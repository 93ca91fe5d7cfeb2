"""Files that hold many images each, as a set of which every image is found by its path and read by its place."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from selfsight.datamodules.images.decode import MAX_PIXELS, Unreadable, decode
from selfsight.datamodules.images.formats import refusing
from selfsight.datamodules.images.sets import Decoder, ImageSet, below
from selfsight.errors import UserError


class Store(Protocol):
    """Where the bytes of images are. A worker process gets a copy, and opens the files itself."""

    root: Path

    def content(self, place: Sequence[int]) -> bytes:
        """What lies at a place; raises OSError or `Unreadable`."""

    def stored_size(self, place: Sequence[int]) -> int | None:
        """How many bytes that are, where it is known without reading them."""


class ArchiveImages(ImageSet):
    """Images in files that hold many, decoded when read.

    Args:
        names: of the images, as `Archives` calls them. places: ``[N, P]`` where each lies, as ``store`` takes it.
        above: what stands before the names, seen from ``root``. decoder: see `FileImages`.
    """

    in_memory = False

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        places: np.ndarray,
        labels: Tensor | None = None,
        above: str = "",
        max_pixels: int = MAX_PIXELS,
        decoder: Decoder | None = None,
    ) -> None:
        assert labels is None or len(labels) == len(names)
        self.root, self.store, self.above, self.labels = store.root, store, above, labels
        self.max_pixels, self.decoder = max_pixels, decoder
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @refusing
    def content(self, index: int) -> bytes:
        """What the file holds that image ``index`` is."""
        place = self._places[index].tolist()
        try:
            content = self.store.content(place)
        except OSError as error:
            raise Unreadable(f"the file it lies in cannot be read: {error.strerror or error}") from None
        if len(content) < (self.store.stored_size(place) or 0):
            raise Unreadable("the file it lies in is cut short")
        return content

    def read(self, index: int) -> np.ndarray:
        content = self.content(index)
        return decode(content, self.max_pixels) if self.decoder is None else self.decoder(content, self.max_pixels)

    def stored_size(self, index: int) -> int | None:
        return self.store.stored_size(self._places[index].tolist())

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(self.content(index), digest_size=16).digest()

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[index]))

    def addresses(self, top: Path) -> list[str]:
        return below(top, self.root, [self.above + self.name(index) for index in range(len(self))])

    def _select(self, chosen: Tensor) -> ArchiveImages:
        some = ArchiveImages(
            self.store, [], self._places[chosen.numpy()], None, self.above, self.max_pixels, self.decoder
        )
        some._names = self._names[chosen.numpy()]
        return some


class Archives:
    """The images in such files below a folder, found by path as those of any folder.

    Attributes:
        store: their bytes. origin: where the numbers of their classes are from. classes: names of these, where known.
        left_out: endings of what is no image, with their number.
        folders: what `folders.folder` looks for a folder ``train`` in; None: the folders on the disk.
    """

    def __init__(self, root: Path, store: Store, origin: str) -> None:
        self.root, self.store, self.origin = root, store, origin
        self.classes: list[str] = []
        self.left_out = Counter[str]()
        self.folders: list[str] | None = None
        self._places: dict[str, tuple[int, ...]] = {}
        self._labels: dict[str, int] = {}

    def below(self, place: Path, aside: Sequence[Path] = ()) -> list[str]:
        """Paths of all images below ``place``, relative to it, sorted; the folders ``aside`` are left out."""
        inside, others = self._prefix(place), [self._prefix(other) for other in aside]
        return sorted(
            path.removeprefix(inside)
            for path in self._places
            if path.startswith(inside) and not any(path.startswith(other) for other in others)
        )

    def images(
        self,
        place: Path,
        paths: Sequence[str],
        labels: Tensor | None = None,
        max_pixels: int = MAX_PIXELS,
        decoder: Decoder | None = None,
    ) -> ArchiveImages:
        """The images ``paths`` below ``place``."""
        inside = self._prefix(place)
        places = np.array([self._places[inside + path] for path in paths], dtype=np.int64).reshape(len(paths), -1)
        return ArchiveImages(self.store, paths, places, labels, inside, max_pixels, decoder)

    def holds(self, path: Path) -> bool:
        """Whether there is such an image."""
        return os.path.relpath(path, self.root) in self._places

    def names_of_classes(self, place: Path, paths: Sequence[str]) -> list[str]:
        """The class of each image by what lies beside it; empty where there is nothing."""
        numbers = [self._labels.get(self._prefix(place) + path) for path in paths]
        named = self.classes
        return ["" if n is None else named[n] if 0 <= n < len(named) else str(n) for n in numbers]

    def _prefix(self, place: Path) -> str:
        if not place.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"'{place}' lies outside '{self.root}', whose files are read; put its own there.")
        inside = place.resolve().relative_to(self.root.resolve()).as_posix()
        return "" if inside == "." else inside + "/"
