"""Files that are whole or as they were before: written beside the target, then moved over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsight.errors import USAGE, UserError


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path`` and move it there, so that no reader ever meets half a file.

    Raises:
        UserError: it cannot be written; what was written of it is gone.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({error.strerror or error}); free space or permission to write is needed "
            "there."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as they are, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    replace(path, lambda beside: beside.write_text(text, encoding="utf-8", newline=""))


def with_folder(path: Path) -> Path:
    """``path``, a file to write, once its folder is there.

    Raises:
        UserError: the folder cannot be made, or the file would take the place of a folder.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; name a file to write, such as {path / 'NAME'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder of '{path}' cannot be made ({error.strerror}); name a place you may write."
        ) from None
    return path


def in_folder(path: Path) -> Path:
    """``path``, a file to write into a folder that is there.

    Raises:
        UserError: it is not.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder '{path.parent}' to write '{path.name}' into; make it first.")
    return path


def place_to_write(out: str | None, default: Path | None, lacking: str) -> Path:
    """Where a command writes: what ``out`` names, else its ``default``.

    Args:
        lacking: what has to be said where there is neither: ``the list goes: out=kept.txt``.

    Raises:
        UserError: there is neither.
    """
    if out is not None:
        return Path(out).expanduser()
    if default is None:
        raise UserError(f"say where {lacking}.", status=USAGE)
    return default
