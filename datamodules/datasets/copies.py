"""Images that are in two sets at once: copies of a file, and copies of its pixels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.formats import Look, kind, read_file
from selfsight.datamodules.images.sets import ImageSet

Place = tuple[ImageSet, int]
Looks = Callable[[ImageSet], Sequence[Look]]

#: images that are decoded to find copies in other formats; where more come into question, none is looked for
MOST_DECODED = 5_000


def copies(first: ImageSet, second: ImageSet, looks: Looks | None = None) -> dict[int, int]:
    """The images of ``first`` that are in ``second`` too: their positions there and here.

    Where all images lie in files, or were decoded from some, equal files are found without decoding any. With
    ``looks`` those of equal pixels are found, too: among files that end alike, which are copies with other metadata;
    and among files of different formats and equal sides, which are pictures that were stored again without loss, as
    long as those are no more than `MOST_DECODED`. Where nothing has to be decoded, all pixels are compared.

    Args:
        looks: at the files of a set.
    """
    ones, others = ([(images, i) for i in range(len(images))] for images in (first, second))
    if not (first.in_memory or second.in_memory) and all(map(_in_archive, (*ones, *others))):
        return _matched(ones, others, lambda one: one[0].stored_size(one[1]), lambda one: one[0].digest(one[1]))
    in_files = all(images.file(i) is not None for images, i in (*ones, *others))
    if in_files and not (first.in_memory and second.in_memory):
        found = _matched(ones, others, lambda one: _file(one).stat().st_size, _content)
        if looks is None:
            return found
        seen = {id(images): looks(images) for images in (first, second)}
        rest = [one for one in ones if one[1] not in found]
        found |= _matched(rest, others, lambda one: seen[id(one[0])][one[1]].tail or None, _pixels)
        formats = {one: kind(seen[id(one[0])][one[1]].start) for one in (*ones, *others)}
        for of in {formats[one] for one in ones}:
            rest = [one for one in ones if formats[one] == of and one[1] not in found]
            if elsewhere := [one for one in others if formats[one] != of]:  # else no header has to be read
                found |= _matched(rest, elsewhere, _sides, _pixels, MOST_DECODED)
        return found
    return _matched(ones, others, lambda one: one[0].glimpse(one[1]), _pixels)


def duplicates(first: ImageSet, second: ImageSet) -> int:
    """How many images of ``first`` are in ``second`` too, see `copies`."""
    return len(copies(first, second))


def _matched(
    ones: Sequence[Place],
    others: Sequence[Place],
    glimpse: Callable[[Place], Hashable],
    digest: Callable[[Place], Hashable],
    most: int | None = None,
) -> dict[int, int]:
    """Which of ``ones`` are among ``others``. Only those that agree at a glance (None: in nothing) are looked at.

    Where these are more than ``most``, none is.
    """

    def looked_at(items: Iterable[Place], look: Callable[[Place], Hashable]) -> Iterator[tuple[Place, Hashable]]:
        for item in items:
            with contextlib.suppress(Unreadable, OSError):
                yield item, look(item)

    glimpses = [list(looked_at(items, glimpse)) for items in (ones, others)]
    common = ({seen for _, seen in glimpses[0]} & {seen for _, seen in glimpses[1]}) - {None}
    left, right = ([item for item, seen in part if seen in common] for part in glimpses)
    if most is not None and len(left) + len(right) > most:
        return {}
    known = {seen: index for (_, index), seen in reversed([*looked_at(right, digest)])}
    return {index: known[seen] for (_, index), seen in looked_at(left, digest) if seen in known}


def _in_archive(place: Place) -> bool:
    """Whether an image is a file inside another one."""
    images, index = place
    return images.file(index) is None and images.stored_size(index) is not None


def _pixels(place: Place) -> bytes:
    images, index = place
    return images.digest_of_pixels(index)


def _sides(place: Place) -> tuple[int, int] | None:
    """Of an image as its header has them, which an orientation may turn; None where Pillow does not know them."""
    try:
        with Image.open(_file(place)) as image:
            return min(image.size), max(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _content(place: Place) -> bytes:
    return _digest(read_file(_file(place)))


def _file(place: Place) -> Path:
    images, index = place
    file = images.file(index)
    assert file is not None
    return file


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
