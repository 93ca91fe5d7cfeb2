"""What the data ask of a user's values and files beyond `selfsight.validation`: colours, paths, text."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from selfsight.errors import UserError, nearest
from selfsight.validation import Kind, above, each, expect, number

#: what ``dataset.labels`` may be, besides a path
RULES = ("auto", "folders", "none")

NUMBER = number("a number", lambda v: True)
#: on the command line ``2024`` is a number even if a folder is called so
PATH = Kind("a path", lambda v: isinstance(v, (str, Path, Integral)) and not isinstance(v, bool) and str(v) != "")


def channels(key: str, values: Any, *, positive: bool = False, count: int = 3) -> tuple[float, ...]:
    """One finite number for each channel: of red, green and blue, or of ``count``.

    Raises:
        UserError: other values.
    """
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values
    numbers = each(above(0) if positive else NUMBER)
    how_many, of = ("three", "red, green and blue") if count == 3 else (str(count), f"the {count} channels")
    said = f"a list of {how_many} numbers{' above 0' if positive else ''}, for {of},"
    return tuple(map(float, expect(key, listed, Kind(said, lambda v: numbers.fits(v) and len(v) == count))))


#: which channels of the files are learned from
CHANNELS = Kind(
    "auto, rgb, a number of channels, or a list of channels from 1 on",
    lambda v: v in ("auto", "rgb") if isinstance(v, str) else _is_channel(v) or _are_channels(v),
)


def _is_channel(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _are_channels(values: Any) -> bool:
    return isinstance(values, Sequence) and len(values) > 0 and all(map(_is_channel, values))


def path(key: str, value: Any) -> Path:
    """A path, which may be written ``file://…``; ``~`` is the home folder.

    Raises:
        UserError: another value.
    """
    text = str(expect(key, value, PATH))
    return Path(url2pathname(text.removeprefix("file://")) if text.startswith("file://") else text).expanduser()


def data_folder(root: Any, *inside: str) -> Path:
    """``root``; None: the folder (``inside`` it) that the environment variable SELFSIGHT_DATA names, else ``data``."""
    return Path(os.environ.get("SELFSIGHT_DATA", "data"), *inside) if root is None else path("dataset.root", root)


def composed(name: str) -> str:
    """A name as most systems store it, accents and letters in one character; what looks the same is then the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spellings(name: str) -> list[str]:
    """The ways in which a name may be stored, as it is given first."""
    return [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]


def shown(name: str) -> str:
    """The name of a file in a sentence: bytes that are no text, and characters that move the cursor, are marked."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_text(file: Path) -> str:
    """What a text file holds.

    Raises:
        UserError: it cannot be read, or is in another encoding than UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): name a text file that you may read.") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"'{file}' is no text in UTF-8: save it again in this encoding.")
    return text


def missing_table(root: Path, name: str) -> UserError:
    return UserError(f"dataset.labels names the file '{root / name}', which does not exist.{nearest(name, RULES)}")
