"""What lies behind ``http(s)://``, ``s3://`` and ``gs://``, read through fsspec (extra ``remote``).

What was read stays on disk in blocks, the ones used longest ago giving way to new ones. A connection that drops or
stands still is made again. Labels, the record of a prepared folder and the indices are kept beside the blocks, so that
the set looks like a local one to whoever lists it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from selfsight.datamodules.images.prepared import RECORD
from selfsight.errors import UserError
from selfsight.files import replace

log = logging.getLogger("selfsight")
Got = TypeVar("Got")

#: bytes that are asked for at a time
BLOCK = 2**22
#: how often something is asked for, seconds before the second time, doubled before each further one, and seconds
#: without a byte after which an answer is given up
TRIES, WAIT, PATIENCE = 6, 0.5, 60.0
#: share of its size that the cache is emptied to, and after which share of new bytes it is looked at again
EMPTIED, LOOKED_AT = 0.9, 1 / 16
#: what else of a set is fetched, where it is there
BESIDE = (RECORD, "labels.csv")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_URL = re.compile(r"(https?|s3|gs|memory)://.+")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Unreachable(OSError):
    """What a server does not give, however often it is asked; ``strerror`` is the reason.

    Attributes:
        refused: it answered that there is no such thing, or none that one may read.
    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(0, reason)
        self.refused = refused


def is_url(root: object) -> bool:
    """Whether a root lies behind a server."""
    return isinstance(root, str) and _URL.fullmatch(root) is not None


def cache_folder(asked: str | Path | None) -> Path:
    """Where what was fetched is kept: ``asked``, or ``selfsight`` in the user's folder for caches."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "selfsight"
    return Path(usual if asked is None else asked).expanduser()


class Remote:
    """What lies at an URL, asked for as often as it takes, and a folder that holds what is known of it.

    Args:
        url: as a person gave it. base: of the folder that names are relative to.
        cache: a folder. limit: bytes that blocks may take in it.

    Attributes:
        root: a folder for folders, labels, record and indices, so that the set looks like a local one.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, url: str, base: str, cache: Path, limit: int) -> None:
        self.url, self.base, self.scheme = url, base, url.partition("://")[0]
        self._opened: tuple[int, Any] | None = None
        self.blocks = Blocks(cache / "blocks", limit)
        self.root = cache / "sets" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __str__(self) -> str:
        return self.url

    def shown(self, name: str) -> str:
        """The address of a file."""
        return f"{self.base}/{name}"

    # --- asking ------------------------------------------------------------------------------------------------------

    def _filesystem(self) -> Any:
        """fsspec's, one a process: connections do not outlive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            package = PACKAGES.get(self.scheme, "'selfsight[remote]'")
            try:
                import fsspec

                options: dict[str, Any] = {}
                if self.scheme.startswith("http"):
                    from aiohttp import ClientTimeout

                    patience = ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
                    options = {"client_kwargs": {"timeout": patience}}
                self._opened = os.getpid(), fsspec.filesystem(self.scheme, **options)
            except ImportError:
                raise UserError(
                    f"dataset.root is '{self.url}', which takes a package: pip install {package}."
                ) from None
        return self._opened[1]

    def _ask(self, question: Callable[[Any], Got]) -> Got:
        """What a server answers; asked again where it does not.

        Raises:
            Unreachable: there is no such thing, it may not be read, or no answer came.
        """
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                return question(self._filesystem())
            except (Unreachable, UserError):
                raise
            except Exception as raised:  # each file system raises its own; that of HTTP calls all of them not found
                error = (raised.__cause__ if self.scheme.startswith("http") else None) or raised
                status = getattr(error, "status", 404 if isinstance(error, FileNotFoundError) else 0)
                if status in (401, 403) or isinstance(error, PermissionError):
                    reason = f"{status or 403}, forbidden: give the credentials that its server asks for"
                    raise Unreachable(reason, refused=True) from None
                if status in (404, 410):
                    raise Unreachable(f"{status}, not found: look at its address", refused=True) from None
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unreachable(f"{TRIES} times no answer: {reason}")

    def listed(self) -> dict[str, dict[str, Any]]:
        """What its server lists below the folder: facts by path, as its file system gives them.

        Raises:
            UserError: it cannot be asked.
        """
        try:
            found = self._ask(lambda fs: dict(fs.find(self.base + "/", detail=True)))
        except Unreachable as error:
            raise UserError(f"'{self.url}' cannot be read ({error.strerror}).") from None
        above = str(self._filesystem()._strip_protocol(self.base)).rstrip("/") + "/"
        below = {
            str(path).partition("?")[0].removeprefix(above): about
            for path, about in found.items()
            if str(path).startswith(above)
        }
        return {path: about for path, about in below.items() if stays_below(path)}

    def fetch_beside(self, folders: Iterable[str], names: Sequence[str]) -> None:
        """Keep the files of these names, which say what the images are, as they lie there in these folders."""
        for folder in sorted(folders):
            for name in names:
                place = os.path.join(folder, name)
                content = self._there(place)
                if content is None:
                    (self.root / place).unlink(missing_ok=True)
                else:
                    (self.root / folder).mkdir(parents=True, exist_ok=True)
                    replace(self.root / place, functools.partial(Path.write_bytes, data=content))

    def _there(self, name: str) -> bytes | None:
        """A small file; None where there is none that one may read, or a web page in its place."""
        try:
            content = bytes(self._ask(lambda fs: fs.cat_file(self.shown(name))))
        except Unreachable as error:
            if error.refused:
                return None
            raise UserError(f"'{self.shown(name)}' cannot be read ({error.strerror}).") from None
        if name == RECORD:
            try:
                json.loads(content)
            except ValueError:
                return None
        return None if is_page(content) else content


class RemoteTars(Remote):
    """The tar files at an URL: `tars.LocalTars` for what is elsewhere.

    Args:
        url: of a folder whose server lists it, of one tar file, or of several: ``…/train-{000..099}.tar``.
        cache, limit: see `Remote`.

    Raises:
        UserError: a package is missing, there is nothing at the URL, or no tar file.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        self.named = expanded(url) if url.endswith(".tar") else []
        super().__init__(url, common_folder(self.named) if self.named else url.rstrip("/"), cache, limit)
        self._states: dict[str, list[Any]] = {}
        self.tars = self._listed()
        for tar in self.tars:
            self.index(tar).parent.mkdir(parents=True, exist_ok=True)
        self.fetch_beside({"", *(os.path.dirname(tar) for tar in self.tars)}, BESIDE)

    def index(self, tar: str) -> Path:
        """What the name of its index begins with."""
        return self.root / tar

    def state(self, tar: str) -> list[Any]:
        """Length, and what else tells whether a tar file is the one that it was."""
        if tar not in self._states:
            about = self._ask(lambda fs: fs.info(self.shown(tar)))
            if about.get("size") is None:
                raise Unreachable("its server does not say how long it is")
            mark = next((str(about[key]) for key in ("ETag", "etag", "LastModified", "mtime") if about.get(key)), "")
            self._states[tar] = [int(about["size"]), mark]
        return self._states[tar]

    def read(self, tar: str, offset: int, size: int) -> bytes:
        """Bytes of a tar file, as many of them as there are; raises `Unreachable`."""
        first, last = offset // BLOCK, max(offset, offset + size - 1) // BLOCK
        content = b"".join(self._block(tar, number) for number in range(first, last + 1))
        return content[offset - first * BLOCK :][:size]

    def content(self, place: Sequence[int]) -> bytes:
        """What lies at number of the tar file, offset, size; see `archives.Store`."""
        tar, offset, size = place
        return self.read(self.tars[tar], offset, size)

    def stored_size(self, place: Sequence[int]) -> int:
        return place[2]

    def open(self, tar: str) -> io.BufferedReader:
        """A tar file as one reads it from its beginning to its end."""
        return io.BufferedReader(_File(self, tar), BLOCK)

    def _block(self, tar: str, number: int) -> bytes:
        length, mark = self.state(tar)
        start, end = number * BLOCK, min(length, (number + 1) * BLOCK)
        if end <= start:
            return b""
        key = hashlib.sha256(f"{self.shown(tar)} {length} {mark} {BLOCK}".encode()).hexdigest()[:16] + f"-{number}"
        content = self.blocks.get(key)
        if content is None or len(content) != end - start:
            content = self._ask(
                lambda fs: _whole(fs.cat_file(self.shown(tar), start=start, end=end), end - start, length)
            )
            self.blocks.put(key, content)
        return content

    def _listed(self) -> list[str]:
        if self.named:
            return [name.removeprefix(self.base + "/") for name in self.named]
        tars = sorted(path for path in self.listed() if path.endswith(".tar"))
        if not tars:
            raise UserError(
                f"'{self.url}' lists no tar files: name them, such as dataset.root={self.base}/train-{{000..009}}.tar."
            )
        return tars

    def published_index(self, tar: str, ending: str) -> dict[str, Any]:
        """The index that lies beside a tar file, where there is one of a file of this length; else nothing."""
        try:
            content = json.loads(self._there(tar + ending) or b"{}")
            return dict(content) if content["tar"][0] == self.state(tar)[0] else {}
        except (ValueError, KeyError, TypeError, IndexError):
            return {}


def _whole(content: bytes, size: int, length: int) -> bytes:
    """A range of a file, as it was asked for."""
    if len(content) == length != size:
        raise Unreachable("its server gives whole files alone, no ranges of them: copy it to a disk")
    if len(content) != size:
        raise ConnectionError(f"{len(content)} bytes came of {size}")
    return content


class _File(io.RawIOBase):
    """A remote tar file that is read and sought in."""

    def __init__(self, tars: RemoteTars, tar: str) -> None:
        self.tars, self.tar, self.at, self.length = tars, tar, 0, tars.state(tar)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        content = self.tars.read(self.tar, self.at, min(len(buffer), max(0, self.length - self.at)))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


class Blocks:
    """Files of bytes in a folder, which together take about ``limit`` bytes at most; several processes share them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._new, self._told = limit, False  # what others have left is looked at once

    def get(self, key: str) -> bytes | None:
        """What is kept under a name; None where nothing is."""
        path = self.folder / key[:2] / key
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep ``content``, if there is room; otherwise a warning says so, once."""
        self._new += len(content)
        if self._new > self.limit * LOOKED_AT:
            self.trim(len(content))
        for last in (False, True):
            try:
                path = self.folder / key[:2] / key
                path.parent.mkdir(parents=True, exist_ok=True)
                replace(path, lambda beside: beside.write_bytes(content))
                return
            except (OSError, UserError) as error:
                if not last:
                    self.trim(self.limit // 4)
                elif not self._told:
                    self._told = True
                    log.warning(
                        f"what is fetched cannot be kept and is fetched anew every time ({str(error).rstrip('.')}): "
                        "name a folder with room, dataset.cache=DIR, or keep less, dataset.cache_gb=N."
                    )

    def trim(self, room: int = 0) -> None:
        """Delete what was used longest ago, until there is room for so many bytes."""
        self._new = 0
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in found)
        if total + room <= self.limit:
            return
        for _, size, path in sorted(found):
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
            if total + room <= EMPTIED * self.limit:
                return


def expanded(url: str) -> list[str]:
    """``a-{08..10}.tar`` to ``a-08.tar``, ``a-09.tar``, ``a-10.tar``."""
    if (found := _RANGE.search(url)) is None:
        return [url]
    first, last = found[1], found[2]
    names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [each for name in names for each in expanded(url[: found.start()] + name + url[found.end() :])]


def common_folder(urls: Sequence[str]) -> str:
    """The folder that all of them lie in."""
    parts = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    return "/".join(each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, parts))


def stays_below(path: str) -> bool:
    """Whether a path that a server names leads to no other place than below the folder that it is taken from."""
    return all(part not in ("", ".", "..") for part in path.split("/"))


def is_page(content: bytes) -> bool:
    """Whether bytes are the beginning of a web page."""
    return content[:200].lstrip().lower().startswith((b"<!doctype html", b"<html"))
