"""The making of a prepared folder (see `prepared`), a part after the other, each of which is whole or absent."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsight.datamodules.datasets.checks import composed
from selfsight.datamodules.datasets.labels import Labeller
from selfsight.datamodules.datasets.search import TABLE as LABELS
from selfsight.datamodules.datasets.search import left_out, search, walk
from selfsight.datamodules.datasets.tables import read_rows, relative
from selfsight.datamodules.images.bands import UNTOLD, decode_bands, kind_of_bytes, kind_of_file
from selfsight.datamodules.images.decode import MAX_PIXELS, Unreadable, decode, read_image
from selfsight.datamodules.images.formats import read_file
from selfsight.datamodules.images.prepared import RECORD, SOURCES, TABLE, begun, encode_jpeg, resized, shard_name
from selfsight.datamodules.images.tars import INDEX, LABEL, members, sample
from selfsight.errors import UserError

#: JPEG files made between two looks at the clock
CHUNK = 64


class Preparation:
    """The images below ``source``, on their way to ``out``.

    Args:
        settings: ``encode``, ``shortest``, ``quality`` and ``per_shard``, see ``conf/prepare.yaml``.
        max_pixels: of the largest image that is read.

    Attributes:
        parts: paths of the images that are made at a time.
        bytes: size of the source's images.
        left_out: what lies in the source and is no image, in words.
        reduced: images that are more than RGB of eight bits, by their kind; what is made of them is RGB of eight bits.

    Raises:
        UserError: no images, or a ``labels.csv`` that cannot be read.
    """

    def __init__(self, source: Path, out: Path, settings: dict[str, Any], max_pixels: int = MAX_PIXELS) -> None:
        self.source, self.out, self.settings, self.max_pixels = source, out, settings, max_pixels
        self.about = {**settings, "source": str(source.resolve())}
        self.tar = settings["encode"] == "tar"
        self.sharded = self.tar or settings["encode"] == "raw"
        found = search(source)
        self.paths = sorted([*found.paths, *found.broken])
        self.left_out = left_out([found])
        kinds = {} if self.tar else {path: kind_of_file(source / path) for path in found.paths}
        self.reduced = Counter(str(kind) for kind in kinds.values() if kind not in (None, UNTOLD))
        if not self.paths:
            raise UserError(f"'{source}' holds no images" + (f": {self.left_out}." if self.left_out else "."))
        self.names = self._named(self.paths)
        self.known, self.classes = self._labelled() if self.tar else ({}, [])
        self.parts = self._cut(self.paths)
        self.labels = {
            place.above: [row for _, row in read_rows(source / place.above / LABELS)]
            for place in walk(source)
            if LABELS in place.files
        }
        self.sources = {path: _size_and_time(source / path) for path in self.paths}
        self.bytes = sum(size for size, _ in self.sources.values())

    def _labelled(self) -> tuple[dict[str, int], list[str]]:
        """The number of the class of each image, as `folder` finds them in the whole folder; and the classes."""
        found = Labeller(self.source, "auto")(self.source, self.paths)
        numbers = [] if found.labels is None else found.labels.tolist()
        return dict(zip(self.paths, numbers, strict=False)), list(found.classes)

    def begin(self) -> None:
        """Make the folder, or go on in one that the same command began: what has changed since is made again.

        Raises:
            UserError: the folder holds something else, or was begun otherwise.
        """
        there = begun(self.out)
        if there is None and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"out is '{self.out}', which exists and is not empty; name a new folder.")
        for key, value in self.about.items():
            if there is not None and there.get(key) != value:
                raise UserError(
                    f"'{self.out}' was begun with {key}={there.get(key)}, and now it is {value}; name a new folder."
                )
        self.out.mkdir(parents=True, exist_ok=True)
        self._record(finished=False)
        old = self._known()
        if old != self.sources:
            self._forget(old)
            write(self.out / SOURCES, json.dumps(self.sources))

    def make(self, number: int) -> dict[str, str]:
        """Write the images of a part, unless they are there; those that cannot be read, with the reason."""
        if self.tar:
            return self._tar(number)
        return self._shard(number) if self.sharded else self._files(number)

    def finish(self, unreadable: dict[str, str]) -> int:
        """Table, labels and record, when all parts are made; returns the size of the folder."""
        if self.sharded and not self.tar and not (self.out / TABLE).is_file():
            tables = ((self.out / shard_name(number)).with_suffix(".csv") for number in range(len(self.parts)))
            write(self.out / TABLE, b"".join(table.read_bytes() for table in tables))
        self._copy_labels(unreadable)
        size = sum(place.stat().st_size for place in self.out.rglob("*") if place.is_file())
        classes = {"classes": self.classes} if self.classes else {}
        self._record(finished=True, **classes, unreadable=unreadable, bytes_before=self.bytes, bytes_after=size)
        return size

    def _record(self, **content: Any) -> None:
        about = {**self.about, "images": len(self.paths), **content}
        write(self.out / RECORD, json.dumps(about, indent=2) + "\n")

    def _known(self) -> dict[str, Any]:
        """What was known of the source when the folder was last worked on; nothing where that was not kept."""
        try:
            return dict(json.loads((self.out / SOURCES).read_text()))
        except (OSError, ValueError):
            return dict.fromkeys(self.paths)

    def _forget(self, old: dict[str, Any]) -> None:
        """Delete what was made of images that are gone now or have changed, and folders that nothing is in any more."""
        if self.sharded:
            now = [[(path, self.sources[path]) for path in part] for part in self.parts]
            then = [[(path, old[path]) for path in part] for part in self._cut(sorted(old))]
            stale = [number for number, part in enumerate(then) if number >= len(now) or part != now[number]]
            shards = [self.out / shard_name(number) for number in stale]
            endings = (".csv", ".json", ".bin", ".tar", f".tar{INDEX}")
            gone = [shard.with_name(shard.stem + ending) for shard in shards for ending in endings]
            gone.append(self.out / TABLE)
        else:
            gone = [
                self.out / name
                for path, name in self._named(sorted(old)).items()
                if self.sources.get(path) != old[path] or self.names[path] != name
            ]
        for place in [*gone, *self.out.rglob(LABELS)]:
            place.unlink(missing_ok=True)
        used = {str(folder) for path in self.paths for folder in Path(path).parents}
        for folder, _, _ in os.walk(self.out, topdown=False):
            if os.path.relpath(folder, self.out) not in used:
                with contextlib.suppress(OSError):  # there is something in it
                    os.rmdir(folder)

    def _named(self, paths: Sequence[str]) -> dict[str, str]:
        """What the images are called here. A JPEG keeps its name, another file gets one more ending; no two are one."""
        if self.sharded:
            return dict(zip(paths, paths, strict=True))
        names = {path: path for path in paths if path.lower().endswith((".jpg", ".jpeg"))}
        taken = set(names)
        for path in paths:
            if path not in names:
                endings = (f".{number}.jpg" if number > 1 else ".jpg" for number in range(1, len(paths) + 2))
                names[path] = next(path + ending for ending in endings if path + ending not in taken)
                taken.add(names[path])
        return names

    def _cut(self, paths: list[str]) -> list[list[str]]:
        size = self.settings["per_shard"] if self.sharded else CHUNK
        return [paths[start : start + size] for start in range(0, len(paths), size)]

    def _files(self, number: int) -> dict[str, str]:
        """Each image as a JPEG."""
        unreadable = {}
        for path in self.parts[number]:
            target = self.out / self.names[path]
            if target.is_file():
                continue
            try:
                image = read_image(self.source / path, self.max_pixels)
            except Unreadable as reason:
                unreadable[path] = str(reason)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, encode_jpeg(resized(image, self.settings["shortest"]), self.settings["quality"]))
        return unreadable

    def _shard(self, number: int) -> dict[str, str]:
        """The pixels of all images in one file."""
        target = self.out / shard_name(number)
        table, reasons = target.with_suffix(".csv"), target.with_suffix(".json")
        if table.is_file():  # written last
            return dict(json.loads(reasons.read_text()))
        rows, unreadable, offset = [], {}, 0
        beside = _beside(target)
        with beside.open("wb") as shard_file:
            for path in self.parts[number]:
                try:
                    image = resized(read_image(self.source / path, self.max_pixels), self.settings["shortest"])
                except Unreadable as reason:
                    unreadable[path] = str(reason)
                    continue
                shard_file.write(image.tobytes())
                rows.append([Path(path).as_posix(), number, offset, *image.shape[:2]])
                offset += image.size
                # folders keep their meaning: train, test, classes
                (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside, target)
        write(reasons, json.dumps(unreadable))
        write(table, _csv(rows))
        return unreadable

    def _tar(self, number: int) -> dict[str, str]:
        """The files of all images as they are, in one tar file, each with the number of its class beside it."""
        target = (self.out / shard_name(number)).with_suffix(".tar")
        reasons = target.with_suffix(".json")
        if target.is_file():  # moved there when it was whole
            return dict(json.loads(reasons.read_text()))
        unreadable: dict[str, str] = {}
        beside = _beside(target)
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as file:
            for path in self.parts[number]:
                try:
                    content = read_file(self.source / path)
                    decode(content, self.max_pixels) if kind_of_bytes(content) is None else decode_bands(content)
                except Unreadable as reason:
                    unreadable[path] = str(reason)
                    continue
                _add(file, Path(path).as_posix(), content)
                if (label := self.known.get(path, -1)) >= 0:
                    _add(file, sample(Path(path).as_posix()) + LABEL, str(label).encode())
                (self.out / path).parent.mkdir(parents=True, exist_ok=True)  # train, test, classes
        write(reasons, json.dumps(unreadable))
        os.replace(beside, target)
        members(target)
        return unreadable

    def _copy_labels(self, unreadable: dict[str, str]) -> None:
        """Every ``labels.csv`` of the source, with the new names and without the images that are not here."""
        for place in list(self.out.rglob(LABELS)):
            place.unlink()
        ours = {composed(path): path for path in self.names}  # a table may store accents in another way
        for above, rows in self.labels.items():
            base = self.source / above
            places = [os.path.normpath(above + relative(row[0], base)) for row in rows]
            places = [ours.get(composed(place), place) for place in places]
            copied = [
                [os.path.relpath(self.names[place], above or os.curdir) if place in self.names else row[0], *row[1:]]
                for place, row in zip(places, rows, strict=True)
                if place not in unreadable
            ]
            (self.out / above).mkdir(parents=True, exist_ok=True)
            write(self.out / above / LABELS, _csv(copied))


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    file.addfile(about, io.BytesIO(content))


def _size_and_time(place: Path) -> list[int]:
    """Of a file; zeros where it is none: it is met, and named, when it is to be read."""
    try:
        stat = place.stat()
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]


def write(target: Path, content: bytes | str) -> None:
    """Write beside the target and move over it, so that a reader never sees half a file."""
    beside = _beside(target)
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, target)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows of a table. Names of files that are no text keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
