"""The files of published data sets: fetched where that is asked for, and read without running what is in them."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.errors import UserError


def obtain(
    name: str, files: Sequence[Path], root: Path, download: bool, fetch: Callable[[Any], Any] | None, by_hand: str = ""
) -> None:
    """See to it that ``files`` exist; only ``download`` fetches them, with torchvision, which verifies what it gets."""
    missing = next((file for file in files if not file.exists()), None)
    if missing is None:
        return
    if not download or fetch is None:
        how = by_hand or "dataset.download=true fetches it"
        raise UserError(
            f"data set '{name}' was looked for in '{root}' and '{missing.relative_to(root)}' is not there: "
            f"{how}, or dataset.root=DIR says where it is."
        )
    from filelock import FileLock  # comes with torch
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):  # one process of a node fetches, the others then find the files
        try:
            if not all(file.exists() for file in files):
                fetch(datasets)
        except (OSError, RuntimeError) as error:
            raise UserError(f"data set '{name}' could not be downloaded to '{root}': {error}") from error


def damaged(file: Path) -> UserError:
    return UserError(f"'{file}' is damaged or no file of this data set: delete it and download it again.")


class ArraysOnly(pickle.Unpickler):
    """Reads arrays, lists and strings, and refuses to call anything else a file may name."""

    ALLOWED = frozenset(["_reconstruct", "ndarray", "dtype", "encode", "scalar"])

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def arrays_only(file: Path) -> dict[str, Any]:
    try:
        content = ArraysOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        return dict(content)
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise damaged(file) from error


def idx_file(file: Path) -> Tensor:
    """MNIST's format: two zero bytes, type (8: uint8), rank, the dimensions as big-endian int32, data."""
    data = file.read_bytes() if file.exists() else gzip.decompress(file.with_name(f"{file.name}.gz").read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise damaged(file)
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4).astype(int).tolist()
    if len(data) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise damaged(file)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
