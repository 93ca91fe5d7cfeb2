"""The parts of a folder: what is learned from, what is held out, and further images without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfsight.datamodules.datasets import checks
from selfsight.datamodules.datasets.search import TABLE, Found, closed, left_out
from selfsight.errors import UserError

#: names of folders, in any case, that hold the images to learn from and those held out
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
#: and further images without labels, beside class folders
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")


@dataclass
class Part:
    """A folder and the paths of the images below it, and what a search of it came upon."""

    place: Path
    paths: list[str]
    found: Found


def path_above(part: Part, top: Path) -> str:
    """What stands before the paths of a part, seen from the top."""
    inside = os.path.relpath(part.place, top)
    return "" if inside == os.curdir else inside + os.sep


def find_parts(
    top: Path,
    test: str | Path | None,
    unlabelled: str | Path | None,
    find: Callable[[Path, Sequence[Path]], Found],
    virtual: Sequence[str] | None,
) -> tuple[Part, Part | None, Part | None]:
    """What is to be learned from, tested on, and learned from without labels (see `folder`).

    Args:
        virtual: names of folders that are in the files in ``top``; None: those on the disk are looked at.
    """
    given = {"dataset.test": test, "dataset.unlabelled": unlabelled}
    named = {
        key: existing_folder(key, top / checks.path(key, value)) for key, value in given.items() if value is not None
    }
    train_top, split = _split_folders(top, virtual)
    test_top, extra_top = named.get("dataset.test", split), named.get("dataset.unlabelled")
    if extra_top is None:
        extra_top = _unlabelled_folder(top)
    aside = [place for place in (test_top, extra_top) if place is not None]

    def part(place: Path, aside: Sequence[Path] = ()) -> Part:
        found = find(place, aside)
        return Part(place, found.paths, found)

    train = _without_train(part(train_top, aside))
    for key, place in named.items():
        if train.place.resolve().is_relative_to(place.resolve()):
            raise UserError(f"{key} is '{place}', where the images to learn from are; name a folder of other images.")
    parts = [train, *(None if place is None else part(place) for place in (test_top, extra_top))]
    for each in parts:
        if each is not None and not each.paths and not each.found.broken:
            others = "".join(f"; '{place}' is left aside" for place in aside if each is train)
            there = left_out([each.found])
            none = f": none of its files is one ({there})" if there else ""
            raise UserError(f"'{each.place}' holds no image{none}{others}.")
    return train, parts[1], parts[2]


def existing_folder(key: str, place: Path) -> Path:
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{key} is '{place}', which {what}; name a folder of images.")
    return place


def _folders_in(top: Path) -> dict[str, Path]:
    """The folders in a folder by their names in small letters; where two have one name, the one in small letters."""
    try:
        with os.scandir(top) as entries:
            return {name.lower(): top / name for name in sorted(each.name for each in entries if each.is_dir())}
    except OSError as error:
        closed(error)


def _split_folders(top: Path, virtual: Sequence[str] | None) -> tuple[Path, Path | None]:
    """The folders in ``top`` to learn from and to test on, by their names; ``top`` alone where one is missing."""
    there = _folders_in(top) if virtual is None else {name.lower(): top / name for name in virtual}
    train, test = (
        next((there[name] for name in names if name in there), None) for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    return (top, None) if train is None or test is None else (train, test)


def _unlabelled_folder(top: Path) -> Path | None:
    """The folder of images without labels beside those of classes, in ``top`` or its ``train``; none with a table."""
    there = _folders_in(top)
    for place in (*(there[name] for name in TRAIN_FOLDERS if name in there), top):
        folders = _folders_in(place)
        found = next((folders[name] for name in UNLABELLED_FOLDERS if name in folders), None)
        if found is not None and len(folders) > 1:
            return None if any((each / TABLE).is_file() for each in (top, place)) else found
    return None


def _without_train(part: Part) -> Part:
    """The folder ``train`` in a part, where it holds all images."""
    first = part.paths[0].split(os.sep)[0] if part.paths else ""
    if first.lower() in TRAIN_FOLDERS and all(path.startswith(first + os.sep) for path in part.paths):
        return Part(part.place / first, [path.removeprefix(first + os.sep) for path in part.paths], part.found)
    return part
