"""Images that are files of their own behind an URL, found by path as in any folder, and fetched when they are read.

Stores list what lies in them, with length and date. Of a web server the paths are those of ``labels.csv``, or of
``files.txt`` (one a line), in the root; where neither is there, those that it lists itself.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.datamodules.images.archives import Archives
from selfsight.datamodules.images.formats import EXTENSIONS
from selfsight.datamodules.images.remote import Remote, Unreachable, is_page, stays_below
from selfsight.errors import UserError

LABELS, NAMES = "labels.csv", "files.txt"
#: what tells a file of a store from another one of its name and length
MARKS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")


class RemoteFiles(Remote):
    """The bytes of single files at an URL, whole, in the cache of blocks; see `archives.Store`.

    A file of a store is fetched again where its length or date is another one. Those of a web server, which would have
    to be asked for each file in each epoch, are taken to stay what they are.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        super().__init__(url, url.rstrip("/"), cache, limit)
        self._names = np.zeros(0, dtype=np.bytes_)  # arrays of bytes, which worker processes share
        self._keys = np.zeros(0, dtype=np.bytes_)

    def keep(self, names: Sequence[str], facts: Mapping[str, Mapping[str, Any]]) -> None:
        """The files that there are, and what is known of each."""
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        states = [f"{self.shown(name)} {size_of(facts.get(name))} {mark_of(facts.get(name))}" for name in names]
        self._keys = np.array([hashlib.sha256(state.encode()).hexdigest()[:24] for state in states], dtype=np.bytes_)

    def content(self, place: Sequence[int]) -> bytes:
        """The file of a number, and of a length, -1 where that is not known; raises `Unreachable`."""
        number, size = place
        key, name = bytes(self._keys[number]).decode(), os.fsdecode(bytes(self._names[number]))
        content = self.blocks.get(key)
        if content is None or (size >= 0 and len(content) != size):
            content = self._ask(lambda fs: whole(fs.cat_file(self.shown(name)), size))
            if is_page(content):
                raise Unreachable("its server answers with a web page (HTML)", refused=True)
            self.blocks.put(key, content)
        return content

    def stored_size(self, place: Sequence[int]) -> int | None:
        return place[1] if place[1] >= 0 else None


class RemoteFolder(Archives):
    """A folder of images behind an URL.

    Raises:
        UserError: there is nothing at the URL, no image, or no list of them.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        files = RemoteFiles(url, cache, limit)
        super().__init__(files.root, files, "")
        files.root.mkdir(parents=True, exist_ok=True)
        files.fetch_beside([""], [LABELS, NAMES])
        web = files.scheme.startswith("http")
        facts = stated(files.root) if web else {}
        facts = facts or files.listed()
        self.tars = sorted(path for path in facts if path.endswith(".tar"))
        paths = [path for path in sorted(facts) if not any(part.startswith(".") for part in path.split("/"))]
        images = [path for path in paths if ending(path) in EXTENSIONS]
        self.left_out.update(ending(path) for path in paths if ending(path) not in EXTENSIONS and not own(path))
        if not images and not self.tars:
            how = f": name them in {files.base}/{LABELS} or /{NAMES}, one path a line" if web else ""
            raise UserError(f"'{url}' lists no images{how}.")
        files.keep(images, facts)
        self._places = {path: (number, size_of(facts[path])) for number, path in enumerate(images)}
        folders = {"/".join(path.split("/")[:depth]) for path in images for depth in range(1, path.count("/") + 1)}
        self.folders = sorted(folder for folder in folders if "/" not in folder)
        keep_folders(files.root, {folder for folder in folders if folder.count("/") < 2})
        files.fetch_beside({os.path.dirname(path) for path in paths if path.endswith("/" + LABELS)}, [LABELS])


def keep_folders(root: Path, wanted: set[str]) -> None:
    """These folders below ``root``, for whoever looks there for train/, test/ and unlabelled/; empty others go."""
    for folder in sorted(wanted):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for there in sorted((path for path in root.glob("**/") if path != root), reverse=True):
        if there.relative_to(root).as_posix() not in wanted:
            with contextlib.suppress(OSError):
                there.rmdir()


def stated(root: Path) -> dict[str, dict[str, Any]]:
    """The paths that a list beside the images states, of which nothing else is known."""
    table, names = root / LABELS, root / NAMES
    if names.is_file():
        lines = names.read_text(encoding="utf-8-sig").splitlines()
    elif table.is_file():
        lines = [row[0] for row in csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"))) if row]
    else:
        return {}
    paths = (line.strip().removeprefix("./") for line in lines)
    return {path: {} for path in paths if ending(path) and stays_below(path)}


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def own(path: str) -> bool:
    """Whether a file is one that says what the images are."""
    return os.path.basename(path) in (LABELS, NAMES)


def size_of(about: Mapping[str, Any] | None) -> int:
    """Bytes of a file; -1 where that is not known."""
    size = (about or {}).get("size")
    return -1 if size is None else int(size)


def mark_of(about: Mapping[str, Any] | None) -> str:
    return next((str((about or {})[key]) for key in MARKS if (about or {}).get(key)), "")


def whole(content: bytes, size: int) -> bytes:
    """A file of a length, as it was asked for."""
    if size >= 0 and len(content) != size:
        raise ConnectionError(f"{len(content)} bytes came of {size}")
    return content
