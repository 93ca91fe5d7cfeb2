"""Features that are too many for the memory: kept in a file, in half precision, and looked at block by block."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsight.errors import UserError

#: bytes of the features of a set, in single precision, from which on they are kept in a file
LARGE = 2**31
#: rows that are worked with at a time
BLOCK_ROWS = 65_536
#: from here on half precision is left alone: its largest number is 65,504
HALF = 1000.0


class Rows:
    """The rows of a matrix ``[N, D]``, made of those of another one when they are asked for.

    Args:
        x: ``[N, D]``, most often a map of a file. make: from rows of it, in single precision, to rows.
        index: ``[n]`` int64, the rows that there are; None: all.
    """

    dtype = torch.float32

    def __init__(self, x: Tensor, make: Callable[[Tensor], Tensor], index: Tensor | None = None) -> None:
        self.x, self.make, self.index = x, make, index
        self.shape = (len(x) if index is None else len(index), x.shape[1])
        self.device = x.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some rows (a slice, or ``[n]`` int64)."""
        return self.make(self.x[rows if self.index is None else self.index[rows]].float())

    def take(self, index: Tensor) -> Rows:
        """Some rows, not made yet."""
        return Rows(self.x, self.make, index if self.index is None else self.index[index])

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows in blocks."""
        return (self[start : start + rows] for start in range(0, len(self), rows))


def blocks(x: Tensor) -> Iterator[Tensor]:
    """The rows of ``x [N, D]`` in double precision, block by block."""
    return (part.double() for part in x.split(BLOCK_ROWS))


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, of which one at a time is in memory."""
    return functools.reduce(torch.add, parts)


class Writing:
    """Features as they come, at most ``images`` rows: in memory, or from `LARGE` bytes on in a file.

    Args:
        file: where they lie if they are many; None: in a file without a name, which ends with the process.
    """

    def __init__(self, images: int | None, file: Path | None) -> None:
        self.images, self.file = images, file
        self.rows = 0
        self._parts: list[Tensor] = []
        self._map: np.ndarray | None = None

    def add(self, x: Tensor) -> None:
        """Further rows ``[B, D]``."""
        x = x.float().cpu()
        if self.images is None or 4 * self.images * x.shape[1] < LARGE:
            self._parts.append(x)
        else:
            if self._map is None:
                self._map = self._opened(x)
            self._map[self.rows : self.rows + len(x)] = x.numpy()
        self.rows += len(x)

    def result(self) -> Tensor:
        """All rows ``[N, D]``."""
        return torch.cat(self._parts) if self._map is None else torch.from_numpy(self._map[: self.rows])

    @property
    def kept(self) -> Path | None:
        """The file that they lie in, where it has a name."""
        return None if self._map is None else self.file

    def _opened(self, x: Tensor) -> np.ndarray:
        half = bool(x.abs().amax() < HALF)
        shape, dtype = (self.images or 0, x.shape[1]), np.float16 if half else np.float32
        try:
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                return np.lib.format.open_memmap(self.file, mode="w+", dtype=dtype, shape=shape)
            with tempfile.NamedTemporaryFile(prefix="selfsight-", suffix=".npy") as made:
                return np.lib.format.open_memmap(made.name, mode="w+", dtype=dtype, shape=shape)
        except OSError as error:
            place = tempfile.gettempdir() if self.file is None else os.fspath(self.file.parent)
            raise UserError(
                f"the features of {self.images:,} images take {np.dtype(dtype).itemsize * np.prod(shape) / 2**30:.1f} "
                f"GiB, which '{place}' does not take ({error.strerror}): make room, or set TMPDIR to another folder."
            ) from None
