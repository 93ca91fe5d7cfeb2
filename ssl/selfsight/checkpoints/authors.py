"""Reading the files that others have published: what a file is follows from its first bytes, never from its name."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.checkpoints.tensorflow import prefix_of, read_bundle
from selfsight.errors import UserError, nearest

KINDS = "safetensors, PyTorch, NumPy's .npz, or the index of a TensorFlow checkpoint"
LFS = b"version https://git-lfs"
PAGE = (b"<!doctype html", b"<html", b"<?xml")

_multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]  # where NumPy makes what its pickles name
#: besides tensors, numbers and containers: options that lie beside the weights, and NumPy's numbers
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    (_multiarray.scalar, "numpy.core.multiarray.scalar"),
    (_multiarray.scalar, "numpy._core.multiarray.scalar"),
    (_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (_multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")},
]


def read(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """What a file of weights holds, on the CPU: mappings, lists, tensors, numbers.

    Args:
        path: a file that PyTorch, safetensors or NumPy wrote, or the name of a TensorFlow checkpoint.
        trust: let the file run the code it brings, as pickle allows it to; otherwise none is run.

    Raises:
        UserError: it is no such file, is damaged or cut off, or brings code.
    """
    path = Path(path).expanduser()
    if (prefix := prefix_of(path)) is not None:
        return dict(read_bundle(prefix))
    if not path.is_file():
        what = "is a folder and no file of weights" if path.is_dir() else "does not exist"
        beside = [str(file) for file in path.parent.glob("*") if file.is_file()] if path.parent.is_dir() else []
        raise UserError(f"'{path}' {what}; give {KINDS}.{nearest(str(path), beside)}")
    size, start = path.stat().st_size, path.open("rb").read(1024)
    refuse_what_is_no_file_of_weights(path, size, start)
    if start[:2] == b"PK":
        return _zipped(path, trust)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return _safetensors(path)
    if start[:1] == b"\x80":
        return _pickled(path, trust)
    raise UserError(f"'{path}' begins with {start[:8]!r}, as no file of weights does that is read here; give {KINDS}.")


def refuse_what_is_no_file_of_weights(path: Path, size: int, start: bytes) -> None:
    """
    Raises:
        UserError: an empty file, a pointer that git left behind, a page that a server sent in place of the file.
    """
    if size == 0:
        raise UserError(f"'{path}' is empty; download it again.")
    if start.startswith(LFS):
        told = next((line.split()[1] for line in start.decode().splitlines() if line.startswith("size ")), "some")
        raise UserError(
            f"'{path}' is the pointer that Git LFS leaves in place of a file of {told} bytes; run `git lfs pull` where "
            "it comes from, and copy it again."
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGE):
        raise UserError(
            f"'{path}' is a web page and holds no weights: the address it was saved from shows the file, or an error, "
            "in place of sending it; download it again from the link to the file itself."
        )


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' cannot be read as safetensors ({error}); it is cut off or damaged, copy it again."
        ) from None


def _zipped(path: Path, trust: bool) -> dict[str, Any]:
    """PyTorch's files since 1.6, and NumPy's; both are zip archives, whose list of contents lies at the end."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise UserError(f"'{path}' is cut off or damaged ({_one_line(error)}); download it again.") from None
    return _torch(path, trust)


def _torch(path: Path, trust: bool) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise UserError(f"'{path}' is damaged ({_one_line(error)}); download it again.") from None
        raise UserError(
            f"'{path}' holds more than tensors and numbers ({_refused(error)}), and to read that is to run code the "
            "file brings, which can do on this machine what you can; add trust=true if you know who made it."
        ) from None
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"'{path}' needs code that is not installed here ({_one_line(error)}); save its state_dict alone, where it "
            "was made."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is cut off or damaged ({_one_line(error)}); download it again.") from None
    return content if isinstance(content, dict) else {"content": content}


def _refused(error: Exception) -> str:
    """What PyTorch would not load, out of its long message."""
    words = str(error).split()
    for before in ("GLOBAL", "global:", "class"):
        if before in words[:-1]:
            return words[words.index(before) + 1].strip("`'.,")
    return _one_line(error)[:80]


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")


# --- plain pickles ---------------------------------------------------------------------------------------------------


class Opaque:
    """Stands for an object of a class that is not loaded: keeps what it was made from, and does nothing."""

    parts: list[Any]

    def __new__(cls, *arguments: Any, **named: Any) -> Opaque:
        made = super().__new__(cls)
        made.parts = [*arguments, *named.values()]
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    @property
    def content(self) -> Any:
        """The one mapping it is made of, or the sequence of its parts."""
        return self.parts[0] if len(self.parts) == 1 else self.parts


class _Arrays(pickle.Unpickler):
    """Loads containers, numbers and NumPy's arrays; every other class becomes an `Opaque`, whose code is never run."""

    HARMLESS = frozenset({"_reconstruct", "scalar", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.HARMLESS:
            if name in ("_reconstruct", "scalar"):
                return getattr(_multiarray, name)
            return getattr(np, name)
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return dict
        if (module, name) == ("_codecs", "encode"):  # how Python 2 stored bytes
            return lambda text, encoding="latin1": text.encode("latin1")
        if module.partition(".")[0] == "dill" and name == "_create_array":
            return _dill_array
        if module.partition(".")[0] == "dill" and name.startswith("_create"):  # it makes a class, such as a named tuple
            return lambda *_, **__: Opaque
        return Opaque


def _dill_array(make: Any, arguments: Any, state: Any, attributes: Any = None) -> Any:
    """An array as dill takes it apart: NumPy's own parts, and attributes of a subclass, which are left out."""
    array = make(*arguments)
    if isinstance(array, np.ndarray):
        array.__setstate__(state)
    return array


def _pickled(path: Path, trust: bool) -> dict[str, Any]:
    """A pickle that is no zip archive: PyTorch's before 1.6 says so itself, others hold NumPy's arrays."""
    with path.open("rb") as file:
        first = file.read(32)
        if torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in first:
            return _torch(path, trust)
        file.seek(0)
        try:
            content = _Arrays(file, encoding="latin1").load()
        except Exception as error:  # of pickle's machine, of NumPy, of what an Opaque cannot do
            raise UserError(f"'{path}' cannot be read as a pickle of arrays ({_one_line(error)}).") from None
    return content if isinstance(content, dict) else {"content": content}


# --- what is in it ---------------------------------------------------------------------------------------------------


def tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested containers by its dotted name; NumPy's arrays among them."""
    if isinstance(content, Opaque):
        content = content.content
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, np.ndarray):
        with contextlib.suppress(TypeError):  # texts and objects are none
            yield prefix, torch.from_numpy(np.ascontiguousarray(content) if content.ndim else content.copy())
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        for key, value in enumerate(content):
            yield from tensors(value, f"{prefix}.{key}" if prefix else str(key))
