"""A look at the files of a folder before training: of which kind they are, and which are damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from selfsight.datamodules.datasets.parts import Part
from selfsight.datamodules.datasets.unreadable import UnreadableFiles
from selfsight.datamodules.images import bands, dicom
from selfsight.datamodules.images.archives import Archives
from selfsight.datamodules.images.bands import Kind
from selfsight.datamodules.images.decode import Unreadable, read_image
from selfsight.datamodules.images.formats import Look, look, read_file
from selfsight.datamodules.images.sets import Decoder

#: up to this many files are looked at before training: their first and last bytes tell most damaged ones
CHECKED = 100_000
#: files of a part that are decoded before training, to tell a folder of images that nothing here can read
SAMPLE = 8


def looks_at(part: Part) -> dict[str, Look]:
    return {path: look(part.place / path) for path in part.paths}


#: files of a part whose kind is looked up where there are too many to look at all
KINDS = 1000


def kinds_of(
    parts: Sequence[Part], seen: Sequence[Mapping[str, Look] | None], window: dicom.Window
) -> dict[Kind | None, list[str]]:
    """The files of each kind (see `bands.stored_kind`): of all that were looked at, else of a sample."""
    found: dict[Kind | None, list[str]] = {}
    for part, looks in zip(parts, seen, strict=True):
        for path in part.paths[:: 1 if looks is not None else max(1, len(part.paths) // KINDS)]:
            start = None if looks is None else looks[path].start
            found.setdefault(bands.kind_of_file(part.place / path, start, window), []).append(path)
    found.pop(bands.UNTOLD, None)
    return found or {None: []}


def kinds_in_archives(parts: Sequence[Part], shards: Archives, window: dicom.Window) -> dict[Kind | None, list[str]]:
    """The same of a sample of images in archives."""
    found: dict[Kind | None, list[str]] = {}
    for part in parts:
        images = shards.images(part.place, part.paths[:: max(1, len(part.paths) // KINDS)])
        for index in range(len(images)):
            with contextlib.suppress(Unreadable):  # whoever reads it will say so
                found.setdefault(bands.kind_of_bytes(images.content(index), window), []).append(images.name(index))
    found.pop(bands.UNTOLD, None)
    return found or {None: []}


def without_damaged(
    part: Part, bad: UnreadableFiles, seen: Mapping[str, Look], damage: Callable[[Path], str | None]
) -> list[str]:
    """The paths without the files that give themselves away or do so in a sample, which are noted in ``bad``."""

    def damages(paths: Sequence[str]) -> dict[str, str]:
        return {path: reason for path in paths if (reason := damage(part.place / path)) is not None}

    sample = part.paths[:: len(part.paths) // SAMPLE] if len(part.paths) > SAMPLE else []
    broken = damages(sample)
    bad.add_sample(broken, len(sample))
    broken |= damages([path for path, each in seen.items() if not each.whole])
    bad.add(broken.items())
    return [path for path in part.paths if path not in broken]


def damage(path: Path, max_pixels: int, decoder: Decoder | None) -> str | None:
    try:
        if decoder is None:
            read_image(path, max_pixels)
        else:
            decoder(read_file(path), max_pixels)
    except Unreadable as reason:
        return str(reason)
    return None
