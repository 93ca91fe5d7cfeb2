"""Images that are in two sets at once: copies of a file, and copies of its pixels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.formats import read_file
from selfsight.datamodules.images.sets import ImageSet

Place = tuple[ImageSet, int]
Tails = Callable[[ImageSet], Sequence[bytes]]


def copies(first: ImageSet, second: ImageSet, tails: Tails | None = None) -> dict[int, int]:
    """The images of ``first`` that are in ``second`` too: their positions there and here.

    Where all images lie in files, or were decoded from some, equal files are found without decoding any; and with
    ``tails``, among the files that end alike, those of equal pixels: copies with other metadata. Where none has to be
    decoded, pixels are compared. A picture that was stored again in another format is found there alone.

    Args:
        tails: hashes of the last bytes of the files of a set; empty ones where they are not known.
    """
    ones, others = ([(images, i) for i in range(len(images))] for images in (first, second))
    if not (first.in_memory or second.in_memory) and all(map(_in_archive, (*ones, *others))):
        return _matched(ones, others, lambda one: one[0].stored_size(one[1]), lambda one: one[0].digest(one[1]))
    in_files = all(images.file(i) is not None for images, i in (*ones, *others))
    if in_files and not (first.in_memory and second.in_memory):
        found = _matched(
            ones, others, lambda one: _file(one).stat().st_size, lambda one: _digest(read_file(_file(one)))
        )
        if tails is None:
            return found
        ends = {id(images): tails(images) for images in (first, second)}
        rest = [one for one in ones if one[1] not in found]
        return found | _matched(rest, others, lambda one: ends[id(one[0])][one[1]] or None, _pixels)
    return _matched(ones, others, lambda one: one[0].glimpse(one[1]), _pixels)


def duplicates(first: ImageSet, second: ImageSet) -> int:
    """How many images of ``first`` are in ``second`` too, see `copies`."""
    return len(copies(first, second))


def _matched(
    ones: Sequence[Place],
    others: Sequence[Place],
    glimpse: Callable[[Place], Hashable],
    digest: Callable[[Place], Hashable],
) -> dict[int, int]:
    """Which of ``ones`` are among ``others``. Only those that agree at a glance (None: in nothing) are looked at."""

    def looked_at(items: Iterable[Place], look: Callable[[Place], Hashable]) -> Iterator[tuple[Place, Hashable]]:
        for item in items:
            with contextlib.suppress(Unreadable, OSError):
                yield item, look(item)

    glimpses = [list(looked_at(items, glimpse)) for items in (ones, others)]
    common = ({seen for _, seen in glimpses[0]} & {seen for _, seen in glimpses[1]}) - {None}
    left, right = ([item for item, seen in part if seen in common] for part in glimpses)
    known = {seen: index for (_, index), seen in reversed([*looked_at(right, digest)])}
    return {index: known[seen] for (_, index), seen in looked_at(left, digest) if seen in known}


def _in_archive(place: Place) -> bool:
    """Whether an image is a file inside another one."""
    images, index = place
    return images.file(index) is None and images.stored_size(index) is not None


def _pixels(place: Place) -> bytes:
    images, index = place
    return images.digest_of_pixels(index)


def _content(place: Place) -> bytes:
    return _digest(read_file(_file(place)))


def _file(place: Place) -> Path:
    images, index = place
    file = images.file(index)
    assert file is not None
    return file


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
