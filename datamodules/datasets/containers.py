"""What the images of a folder lie in where they are no files of their own: tar files, tables, arrays, `prepare`'s."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from selfsight.datamodules.datasets.search import OWN, Found, ending, search, walk
from selfsight.datamodules.images import rows
from selfsight.datamodules.images.archives import Archives
from selfsight.datamodules.images.formats import ARRAYS, OF_MANY, TABLES, TARS
from selfsight.datamodules.images.prepared import Shards, record
from selfsight.datamodules.images.remote import RemoteTars
from selfsight.datamodules.images.remote_files import RemoteFolder
from selfsight.datamodules.images.tars import INDEX, LocalTars, TarShards
from selfsight.errors import UserError


def shards_in(top: Path, tars: bool | str, cache: Path, only: str | None) -> Shards | Archives | None:
    """What holds the images where they are no files of their own: what `prepare` made, tables, arrays, or tar files."""
    made = record(top)
    wanted = tars if isinstance(tars, bool) else _holds_tars_alone(top)
    if not wanted and (made or {}).get("encode") != "tar":
        return Shards.of(top)
    found = [only] if only else [
        place.above + name for place in walk(top) for name in place.files if ending(name) in OF_MANY
    ]  # fmt: skip
    by_kind = {kind: sorted(name for name in found if ending(name) in kind) for kind in (TARS, TABLES, ARRAYS)}
    there = [kind for kind, names in by_kind.items() if names]
    if len(there) > 1:
        examples = " and ".join(f"'{by_kind[kind][0]}'" for kind in there)
        raise UserError(
            f"'{top}' holds archives of several kinds, such as {examples}: name one with dataset.root=FILE."
        )
    if there == [TABLES]:
        return rows.TableShards(top, by_kind[TABLES], cache)
    if there == [ARRAYS]:
        return rows.ArrayShards(top, by_kind[ARRAYS])
    return TarShards(LocalTars(top, by_kind[TARS]))


def remote_images(url: str, tars: bool | str, cache: Path, limit: int) -> Archives:
    """What lies at an URL: tar files where they are asked for or nothing else is there, else files of their own."""
    if tars is True or url.endswith(".tar"):
        return TarShards(RemoteTars(url, cache, limit))
    folder = RemoteFolder(url, cache, limit)
    if folder.below(folder.root):
        return folder
    if tars is False:
        raise UserError(f"'{url}' holds tar files and no images of their own: dataset=shards reads them.")
    return TarShards(RemoteTars(url, cache, limit))


def _holds_tars_alone(top: Path) -> bool:
    """Whether what lies in a folder, and in the folders in it, is tar files with their indices, and nothing else."""
    found = False
    for place in walk(top):
        files = (name for name in place.files if not name.endswith((INDEX, *OWN)))
        for name in files:
            if not name.endswith(".tar"):
                return False
            found = True
        if place.above.count(os.sep) > 1:
            return found
    return found


def finder(shards: Shards | Archives | None) -> Callable[[Path, Sequence[Path]], Found]:
    if shards is None:
        return search
    left_out = iter([shards.left_out] if isinstance(shards, Archives) else [])  # told of the first part, for all
    return lambda place, aside: Found(shards.below(place, aside), left_out=next(left_out, Counter()))
