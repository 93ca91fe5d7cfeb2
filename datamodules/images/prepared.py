"""Folders of images made ready to be read fast: smaller JPEG files, or shards of raw pixels mapped into memory.

A prepared folder holds `RECORD`, which says how it was made, and

- ``encode=jpeg``: the same folders and names as the source, every image a JPEG;
- ``encode=raw``: ``shard-00000.bin``, ... of uint8 pixels one image after another, and ``images.csv`` with path, shard,
  offset, height and width of each. Processes that read them share the pages.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.images.sets import ImageSet, below
from selfsight.errors import UserError

RECORD = "prepared.json"
#: size and time of every image of the source, by path
SOURCES = "sources.json"
TABLE = "images.csv"
COLUMNS = ("path", "shard", "offset", "height", "width")


def record(root: Path) -> dict[str, Any] | None:
    """What `RECORD` in ``root`` says; None where there is none.

    Raises:
        UserError: the preparation was not finished, or the record cannot be read.
    """
    content = begun(root)
    if content is not None and not content.get("finished"):
        raise UserError(
            f"'{root}' was not prepared to the end; repeat the command that began it: it goes on from there."
        )
    return content


def begun(root: Path) -> dict[str, Any] | None:
    """The same of a preparation that may not be finished."""
    place = root / RECORD
    if not place.is_file():
        return None
    try:
        return dict(json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"'{place}' cannot be read; prepare the folder again, under another name.") from None


def resized(image: np.ndarray, shortest: int | None) -> np.ndarray:
    """``[H, W, 3]`` uint8 with its shorter side brought down to ``shortest``; never enlarged."""
    height, width = image.shape[:2]
    if shortest is None or min(height, width) <= shortest:
        return image
    scale = shortest / min(height, width)
    size = max(shortest, round(height * scale)), max(shortest, round(width * scale))
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """``[H, W, 3]`` uint8 RGB as the bytes of a JPEG file, colours at half resolution as cameras store them."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1])


class ShardImages(ImageSet):
    """Images in shards of raw pixels, read through a map of the files: nothing is decoded or held in memory.

    Args:
        root: the prepared folder. rows: of its table, in the order of the images.
        above: what stands before the paths in ``rows``, seen from ``root``.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[tuple[str, int, int, int, int]],
        labels: Tensor | None = None,
        above: str = "",
    ) -> None:
        assert labels is None or len(labels) == len(rows)
        self.root, self.labels, self.above = root, labels, above
        self._names = np.array([os.fsencode(row[0]) for row in rows], dtype=np.bytes_)
        self._places = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 4)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a worker maps the files itself

    def read(self, index: int) -> np.ndarray:
        _, _, height, width = self._places[index].tolist()
        return np.array(self._pixels(index)).reshape(height, width, 3)

    def _pixels(self, index: int) -> np.ndarray:
        """All values of an image in a row, in the map of their file."""
        shard, offset, height, width = self._places[index].tolist()
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.root / shard_name(shard), np.uint8, mode="r")
        return self._maps[shard][offset : offset + height * width * 3]

    def glimpse(self, index: int) -> bytes:
        _, _, height, width = self._places[index].tolist()
        return repr((height, width, 3)).encode() + self._pixels(index)[: width * 3].tobytes()

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[index]))

    def addresses(self, top: Path) -> list[str]:
        return below(top, self.root, [self.above + self.name(index) for index in range(len(self))])

    def _select(self, chosen: Tensor) -> ShardImages:
        some = ShardImages(self.root, [], None, self.above)
        some._names, some._places = self._names[chosen.numpy()], self._places[chosen.numpy()]
        return some


def shard_name(number: int) -> str:
    return f"shard-{number:05}.bin"


def read_table(root: Path) -> list[tuple[str, int, int, int, int]]:
    """Path, shard, offset, height, width of every image in the shards of ``root``, sorted by path.

    Raises:
        UserError: it cannot be read, or tells of pixels that are in no shard.
    """
    ends: dict[int, int] = {}
    try:
        with (root / TABLE).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [(row[0], int(row[1]), int(row[2]), int(row[3]), int(row[4])) for row in csv.reader(file)]
    except (OSError, ValueError, IndexError, csv.Error):
        raise _not_as_prepared(root / TABLE) from None
    for _, shard, offset, height, width in rows:
        if min(offset, height - 1, width - 1) < 0:
            raise _not_as_prepared(root / TABLE)
        ends[shard] = max(ends.get(shard, 0), offset + 3 * height * width)
    for shard, end in ends.items():
        place = root / shard_name(shard)
        if not place.is_file() or place.stat().st_size < end:
            raise _not_as_prepared(place)
    return sorted(rows)


def _not_as_prepared(place: Path) -> UserError:
    return UserError(f"'{place}' is missing, cut short or damaged: copy the folder again, or prepare it again.")


class Shards:
    """The images of a folder prepared with ``encode=raw``, found by path as those of any folder."""

    def __init__(self, root: Path, unreadable: Collection[str] = ()) -> None:
        self.root, self._unreadable = root, unreadable
        self._rows = {row[0]: row for row in read_table(root)}

    @classmethod
    def of(cls, root: Path) -> Shards | None:
        """Those of ``root``; None where it is no such folder."""
        made = record(root)
        return cls(root, made.get("unreadable", ())) if made is not None and made.get("encode") == "raw" else None

    def below(self, place: Path, aside: Sequence[Path] = ()) -> list[str]:
        """Paths of all images below ``place``, relative to it, sorted; the folders ``aside`` are left out."""
        inside, others = self._prefix(place), [self._prefix(other) for other in aside]
        return [
            path.removeprefix(inside)
            for path in self._rows
            if path.startswith(inside) and not any(path.startswith(other) for other in others)
        ]

    def images(self, place: Path, paths: Sequence[str], labels: Tensor | None = None) -> ShardImages:
        """The images ``paths`` below ``place``."""
        inside = self._prefix(place)
        rows = [(path, *self._rows[inside + path][1:]) for path in paths]
        return ShardImages(self.root, rows, labels, inside)

    def holds(self, path: Path) -> bool:
        """Whether there is such an image, or was one that could not be read."""
        inside = os.path.relpath(path, self.root)
        return inside in self._rows or inside in self._unreadable

    def _prefix(self, place: Path) -> str:
        if not place.resolve().is_relative_to(self.root.resolve()):
            raise UserError(
                f"'{place}' lies outside '{self.root}', which holds shards: prepare it with the same settings."
            )
        inside = place.resolve().relative_to(self.root.resolve()).as_posix()
        return "" if inside == "." else inside + "/"
