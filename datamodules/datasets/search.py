"""The images below a folder, and what lies there beside them. Needs no torch.

Contents decide: a file whose ending is none of `formats.EXTENSIONS`, or that has none, is looked into. Nothing is left
out without being counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from selfsight.datamodules.images import formats
from selfsight.errors import UserError

#: the table that gives images their labels
TABLE = "labels.csv"
#: names of files that are ours
OWN = (TABLE, "prepared.json", "sources.json")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
#: what systems leave behind; these names do not begin with a dot
BY_THE_SYSTEM = ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass
class Found:
    """What a search came upon.

    Attributes:
        paths: of the images, relative to the folder, sorted.
        broken: paths with an image's ending that are no files, with the reason: pipes, sockets, links to nothing.
        left_out: endings of what is no image, with their number; an empty ending for names without one.
        hidden: files and folders whose names begin with a dot, or that systems leave behind.
        decoders: what would read images that nothing here can, by their ending.
    """

    paths: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    decoders: dict[str, str] = field(default_factory=dict)


def search(root: Path, aside: Sequence[Path] = ()) -> Found:
    """All images below ``root``; hidden files and the folders ``aside`` are left out.

    Linked folders are followed, each once.

    Raises:
        UserError: a folder cannot be read.
    """
    found = Found()
    for place in walk(root, aside):
        found.hidden += place.hidden
        for name, reason in place.others.items():
            if ending(name) in formats.EXTENSIONS:
                found.broken[place.above + name] = reason
            else:
                found.left_out[ending(name)] += 1
        for name in place.files:
            if ending(name) in formats.EXTENSIONS:  # of a million files as little as can be
                found.paths.append(place.above + name)
                continue
            lacking = None if name in OWN else looked_into(root / place.above / name)
            if lacking == "":
                found.paths.append(place.above + name)
            elif name not in OWN:
                found.left_out[ending(name)] += 1
                if lacking:
                    found.decoders[ending(name)] = lacking
    found.paths.sort()
    return found


def find_images(root: Path, aside: Sequence[Path] = ()) -> list[str]:
    """Paths of all images below ``root``, relative to it, sorted; see `search`."""
    return search(root, aside).paths


def looked_into(path: Path) -> str | None:
    """Whether a file is taken for an image: an empty string, or what would read it; None where it is none."""
    kind = ending(path.name)
    if kind in formats.EXTENSIONS:
        return ""
    if kind in formats.SENSOR_DATA or kind in ARCHIVES:
        return None
    try:
        of = formats.kind(formats.first_bytes(path))
    except formats.Unreadable:
        return None
    return None if of is None else formats.lacking_decoder(of)


@dataclass
class Place:
    """A folder: what stands before the names in it, its files, and what is neither file nor folder, with the reason."""

    above: str
    files: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    hidden: int = 0


def walk(root: Path, aside: Sequence[Path] = ()) -> Iterator[Place]:
    """Every folder that `search` looks at, from the top down."""
    seen = {place.resolve() for place in aside}
    left = [""]
    while left:
        place = Place(left.pop())
        real = (root / place.above).resolve()
        if real in seen:
            continue
        seen.add(real)
        folders = []
        try:
            with os.scandir(root / place.above) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in BY_THE_SYSTEM:
                        place.hidden += 1
                        continue
                    what = _kind(entry)
                    if what == "folder":
                        folders.append(place.above + entry.name + os.sep)
                    elif what == "file":
                        place.files.append(entry.name)
                    else:
                        place.others[entry.name] = what
        except OSError as error:
            closed(error)
        yield place
        left += sorted(folders, reverse=True)


def _kind(entry: os.DirEntry[str]) -> str:
    """``folder``, ``file``, or the reason why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else formats.special(entry.stat().st_mode)
    except OSError as error:
        return formats.reason(error)


def closed(error: OSError) -> NoReturn:
    raise UserError(
        f"the folder '{error.filename}' cannot be read ({error.strerror}): make it readable, or move it elsewhere."
    ) from None


def ending(name: str) -> str:
    """``.jpg``, in small letters; an empty string where the name has none."""
    return os.path.splitext(name)[1].lower()


# --- in words --------------------------------------------------------------------------------------------------------


def told(found: Iterable[Found]) -> str:
    """A line on what was read and what was left out; empty where all files are images of one ending."""
    parts = list(found)
    read = Counter(ending(path) for part in parts for path in part.paths)
    out = left_out(parts)
    return "" if len(read) < 2 and not out else f"read: {counted(read) or 'nothing'}; left out: {out or 'nothing'}"


def left_out(found: Iterable[Found]) -> str:
    """``2 .heic (pip install 'selfsight[heif]' reads them), 3 .txt, 1 hidden``."""
    parts = list(found)
    notes = dict.fromkeys(formats.SENSOR_DATA, "sensor data: develop them first")
    notes |= dict.fromkeys(ARCHIVES, "archives: unpack them to use what they hold")
    for part in parts:
        notes |= part.decoders
    out = counted(sum((part.left_out for part in parts), Counter()), notes)
    hidden = sum(part.hidden for part in parts)
    return ", ".join(filter(None, (out, f"{hidden} hidden" if hidden else "")))


def counted(endings: Counter[str], notes: dict[str, str] | None = None) -> str:
    """``16 .avif, 15 .png, 1 without ending``, the most frequent first."""

    def told(kind: str, number: int) -> str:
        note = (notes or {}).get(kind)
        name = kind.encode(errors="surrogateescape").decode(errors="replace") or "without ending"
        return f"{number:,} {name}" + (f" ({note})" if note else "")

    return ", ".join(told(kind, number) for kind, number in sorted(endings.items(), key=lambda e: (-e[1], e[0])))
