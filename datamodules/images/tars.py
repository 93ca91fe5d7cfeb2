"""Images in tar files, in WebDataset's form, as a set of which every image is read by its place.

The members of a sample share a name up to the first dot: ``sea/17.jpg`` and ``sea/17.cls``. Where each lies is listed
once, in an index beside the tar file, so that order, splits and resumption are those of a folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from selfsight.datamodules.images.archives import Archives
from selfsight.datamodules.images.formats import EXTENSIONS
from selfsight.datamodules.images.prepared import record
from selfsight.datamodules.images.remote import RemoteTars, is_page
from selfsight.errors import UserError
from selfsight.files import write_text

log = logging.getLogger("selfsight")

#: what an index is called: the name of its tar file, and this
INDEX = ".index.json"
#: what else a sample may hold, which is not told as left out
BESIDE = frozenset([".cls", ".json", ".txt", ".caption"])
#: endings of images in shards beside those of a folder
ARRAYS = frozenset([".npy", ".npz", ".heic", ".heif", ".dcm"])
LABEL = ".cls"


class Member(NamedTuple):
    """A file in a tar file, and where its bytes are."""

    name: str
    offset: int
    size: int


class LocalTars:
    """Tar files below a folder, and how their bytes are read. `remote.RemoteTars` is the same for what is elsewhere.

    Attributes:
        tars: their paths below ``root``.
    """

    def __init__(self, root: Path, tars: Sequence[str] | None = None) -> None:
        self.root, self._files = root, dict[str, int]()
        found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar") if path.is_file())
        self.tars = found if tars is None else list(tars)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a worker opens the files itself

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def shown(self, tar: str) -> str:
        """The path of a tar file."""
        return str(self.root / tar)

    def index(self, tar: str) -> Path:
        """What the name of its index begins with."""
        return self.root / tar

    def state(self, tar: str) -> list[Any]:
        """Length and time, by which a tar file is known as the one that it was."""
        about = (self.root / tar).stat()
        return [about.st_size, about.st_mtime_ns]

    def read(self, tar: str, offset: int, size: int) -> bytes:
        """Bytes of a tar file, as many of them as there are; raises OSError."""
        if tar not in self._files:
            self._files[tar] = os.open(self.root / tar, os.O_RDONLY)
        return os.pread(self._files[tar], size, offset)

    def content(self, place: Sequence[int]) -> bytes:
        """What lies at number of the tar file, offset, size; see `Store`."""
        tar, offset, size = place
        return self.read(self.tars[tar], offset, size)

    def stored_size(self, place: Sequence[int]) -> int:
        return place[2]

    def open(self, tar: str) -> IO[bytes]:
        """A tar file as one reads it from its beginning to its end."""
        return (self.root / tar).open("rb")


Tars = LocalTars | RemoteTars


def members(tar: Path) -> list[Member]:
    """The files in a tar file, see `members_of`."""
    return members_of(LocalTars(tar.parent, [tar.name]), tar.name)


def members_of(tars: Tars, tar: str) -> list[Member]:
    """The files in a tar file, from its index; that is made where there is none, or one of an older tar file.

    Raises:
        UserError: the tar file is cut short, compressed, none, or cannot be read.
    """
    place = tars.index(tar).with_name(tars.index(tar).name + INDEX)
    try:
        now = tars.state(tar)
    except OSError as error:
        raise UserError(f"'{tars.shown(tar)}' cannot be read ({error.strerror}).") from None
    try:
        content = json.loads(place.read_text())
        if content["tar"] == now:
            return _stated(content["members"])
        log.warning(
            f"the index '{place}' is of another '{tars.index(tar).name}' than the one there, and is made again."
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    published = tars.published_index(tar, INDEX) if isinstance(tars, RemoteTars) else {}
    try:
        found = _stated(published.get("members", ())) or _listed(tars, tar)
    except (ValueError, TypeError):
        found = _listed(tars, tar)
    with contextlib.suppress(UserError):  # of a folder that may only be read: the next run lists them again
        write_text(place, json.dumps({"tar": now, "members": found}))
    return found


def _stated(members: Sequence[Sequence[Any]]) -> list[Member]:
    """What an index says; raises ValueError or TypeError where that is no list of members."""
    found = [Member(*each) for each in members]
    for each in found:
        if not isinstance(each.name, str) or not all(type(of) is int and of >= 0 for of in (each.offset, each.size)):
            raise ValueError(each)
    return found


def _listed(tars: Tars, tar: str) -> list[Member]:
    size, found, shown = tars.state(tar)[0], [], tars.shown(tar)
    try:
        if is_page(tars.read(tar, 0, 200)):
            raise UserError(
                f"'{shown}' is a web page (HTML), where a tar file was expected: take the address of the file itself, "
                "which needs no login."
            )
        with tars.open(tar) as opened, tarfile.open(fileobj=opened, mode="r:") as file:
            for each in file:
                if each.isreg():
                    found.append(Member(each.name.removeprefix("./"), each.offset_data, each.size))
                if each.offset_data + each.size > size:
                    raise tarfile.ReadError("unexpected end of data")
    except tarfile.ReadError as error:
        if found or "unexpected end" in str(error):
            last = f": '{found[-1].name}' is the last that begins in it" if found else ""
            raise UserError(f"'{shown}' is cut short{last}; copy it again.") from None
        raise UserError(f"'{shown}' is no tar file, or a compressed one; unpack it, or take it away.") from None
    except OSError as error:
        raise UserError(f"'{shown}' cannot be read ({error.strerror}).") from None
    return found


class TarShards(Archives):
    """The images in tar files, found by path as those of any folder.

    A member is called by the folder of its tar file and its own name; where two have one name, by the tar file, too.

    Raises:
        UserError: no tar files; see `members`.
    """

    def __init__(self, tars: Tars) -> None:
        super().__init__(tars.root, tars, "the .cls members of the tar files")
        self.tars = tars
        if not tars.tars:
            raise UserError(f"'{self.root}' holds no tar files; dataset=folder reads images that are files.")
        every = [(number, tar, members_of(tars, tar)) for number, tar in enumerate(tars.tars)]
        names = Counter(above(tar) + each.name for _, tar, found in every for each in found)
        apart = any(count > 1 for count in names.values())
        for number, tar, found in every:
            before = tar.removesuffix(".tar") + "/" if apart else above(tar)
            self._add(number, before, found)
        made = record(self.root)
        self.classes = [] if made is None else made.get("classes", [])

    def _add(self, number: int, before: str, found: Sequence[Member]) -> None:
        labels = {each.name: each for each in found if each.name.endswith(LABEL)}
        tar = self.tars.tars[number]
        for each in found:
            ending = os.path.splitext(each.name)[1].lower()
            if ending in EXTENSIONS or ending in ARRAYS:
                self._places[before + each.name] = (number, each.offset, each.size)
                if (label := labels.get(sample(each.name) + LABEL)) is not None:
                    self._labels[before + each.name] = self._number(tar, label)
            elif ending not in BESIDE:
                self.left_out[ending] += 1

    def _number(self, tar: str, label: Member) -> int:
        """What a ``.cls`` member holds."""
        try:
            content = self.tars.read(tar, label.offset, label.size)
            return int(content)
        except OSError as error:
            raise UserError(f"'{self.tars.shown(tar)}' cannot be read ({error.strerror}).") from None
        except ValueError:
            shown = content[:20].decode(errors="replace")
            raise UserError(
                f"'{label.name}' in '{self.tars.shown(tar)}' holds '{shown}', where the number of a class was expected."
            ) from None


def sample(name: str) -> str:
    """The name of the sample that a member belongs to: up to the first dot after the last folder."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def above(tar: str) -> str:
    """The folder of a tar file, as it stands before the names of members."""
    return tar.rpartition("/")[0] + "/" if "/" in tar else ""
