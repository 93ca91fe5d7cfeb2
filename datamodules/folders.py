"""Any folder of images as a data set: class folders, a list of labels, or no label at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfsight.errors import UserError

from .dataset import ImageData, UnreadableFiles, keep_in_memory
from .decode import EXTENSIONS, Unreadable, looks_whole, read_image
from .images import FileImages, ImageSet, join
from .prepared import Shards, record
from .splits import hold_out

TEST_FOLDERS = ("test", "val", "valid", "validation")


def folder(
    *,
    root: str | None,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    labels: str,
    test: str | None,
    test_fraction: float,
    unlabelled: str | None,
    resident: bool | str,
    max_unreadable: float,
    seed: int,
    eval_resize: int | None = None,
    name: str = "folder",
) -> ImageData:
    """The images below a folder, in any depth.

    Args:
        root: the folder. With a folder ``train`` in it beside ``test``, ``val``, ``valid`` or ``validation``, these two
            are what is learned from and what is held out.
        labels: ``folders``: the first folder below the root is the class. ``none``: no labels. A path, relative to the
            root: a CSV file of ``path,label``; images it does not name, or gives an empty label or -1, have none.
            ``auto``: ``labels.csv`` if the root has one; folders, if there are at least two and no image lies outside
            them; else none.
        test: a folder of held-out images (relative to the root, or absolute), labelled by the same rule.
        test_fraction: without a test folder, the share of the images held out, by ``seed``, in every class; 0: none.
        unlabelled: a folder of further images without labels.
        resident: keep the decoded images in memory: True, False, or ``auto`` (when they are small).
        max_unreadable: share of the files that may be no readable images; they are skipped.

    Raises:
        UserError: no such folder, no images in it, one image, too many unreadable files, a wrong list of labels.
    """
    if not root:
        raise UserError("dataset=folder has to know where the images are: add dataset.root=DIR.")
    top = _existing(Path(root).expanduser(), "dataset.root")
    train_top, test_top = top, None if test is None else _existing(top / test, "dataset.test")
    if test is None and (top / "train").is_dir():
        test_top = next((top / each for each in TEST_FOLDERS if (top / each).is_dir()), None)
        train_top = top if test_top is None else top / "train"
    extra_top = None if unlabelled is None else _existing(top / unlabelled, "dataset.unlabelled")

    shards = Shards.of(top)
    find = find_images if shards is None else shards.below
    images_of = FileImages if shards is None else shards.images
    bad = UnreadableFiles(max_unreadable)
    aside = [place for place in (test_top, extra_top) if place is not None]
    paths = find(train_top, aside)
    if not paths:
        raise UserError(f"'{train_top}' holds no image: none of its files ends in {', '.join(sorted(EXTENSIONS))}.")
    test_paths = [] if test_top is None else find(test_top, [])
    if test_top is not None and not test_paths:
        raise UserError(f"the test folder '{test_top}' holds no image.")
    extra_paths = [] if extra_top is None else find(extra_top, [])
    if extra_top is not None and not extra_paths:
        raise UserError(f"the folder of unlabelled images '{extra_top}' holds no image.")

    bad.files = len(paths) + len(test_paths) + len(extra_paths)
    if shards is None and bad.files <= CHECKED:
        paths = _without_damaged(train_top, paths, bad)
        test_paths = [] if test_top is None else _without_damaged(test_top, test_paths, bad)
        extra_paths = [] if extra_top is None else _without_damaged(extra_top, extra_paths, bad)
    if len(paths) < 2:
        raise UserError(f"'{train_top}' holds {len(paths)} image; there has to be more than one to learn from.")

    known = label(train_top, paths, labels)
    images = keep_in_memory(images_of(train_top, paths, known.labels), resident, bad)
    further: list[ImageSet] = []
    if images.labels is not None and bool((images.labels < 0).any()):
        further.append(images.select((images.labels < 0).nonzero().flatten()))
        images = images.select((images.labels >= 0).nonzero().flatten())
    if extra_top is not None:
        further.append(keep_in_memory(images_of(extra_top, extra_paths), resident, bad))

    held: ImageSet | None = None
    if test_top is not None:
        test_labels = label(test_top, test_paths, labels, known.classes).labels if known.classes else None
        held = keep_in_memory(images_of(test_top, test_paths, test_labels), resident, bad)
    elif test_fraction:
        kept, chosen = hold_out(images.labels, len(images), test_fraction, seed)
        images, held = images.select(kept), images.select(chosen)

    more = None
    if further:
        more = join(*further)
        more.labels = None
    data = ImageData(
        name,
        images,
        held,
        known.classes,
        image_size,
        tuple(mean),
        tuple(std),
        more,
        eval_resize,
        unreadable=bad,
        prepared=record(top),
    )
    data.warn_of_leaks()
    return data


#: up to this many files are looked at before training: their first and last bytes tell most damaged ones
CHECKED = 100_000


def find_images(root: Path, aside: Sequence[Path] = ()) -> list[str]:
    """Paths of all images below ``root``, relative to it, sorted; hidden files and the folders ``aside`` are left out.

    Linked folders are followed, each once.
    """
    found, seen = [], {place.resolve() for place in aside}
    for place, folders, files in os.walk(root, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = os.path.relpath(place, root)
        found += [
            os.path.normpath(os.path.join(inside, name))
            for name in files
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)


@dataclass(frozen=True)
class Labels:
    """``labels [N]`` int64 (-1: none) or None, and the names of the classes."""

    labels: Tensor | None
    classes: tuple[str, ...]


def label(root: Path, paths: Sequence[str], rule: str, classes: Sequence[str] | None = None) -> Labels:
    """Labels of the images ``paths`` below ``root`` by ``rule`` (see `folder`); ``classes`` fixes the classes.

    Raises:
        UserError: a list that is missing, malformed, or names files that do not exist or one twice; a class folder
            that is not among ``classes``; no class folders where some are asked for.
    """
    first = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
    folders = {each for each in first if each is not None}
    if rule == "auto":
        if (root / "labels.csv").is_file():
            rule = "labels.csv"
        else:
            rule = "folders" if None not in first and (len(folders) > 1 or classes) else "none"
    if rule == "none":
        return Labels(None, ())
    if rule == "folders":
        outside = sum(each is None for each in first)
        if outside:
            raise UserError(
                f"{outside} images lie directly in '{root}', outside any class folder: move them, or set "
                "dataset.labels=none."
            )
        names = [str(each) for each in first]
    else:
        names = read_labels(root / rule, root, paths)
    given = {name for name in names if name}
    if classes is None:
        classes = sorted(given, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    unknown = sorted(given - set(classes))
    if unknown:
        raise UserError(f"'{root}' has the class '{unknown[0]}', which the images to learn from do not have.")
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Labels(torch.tensor([number[name] for name in names], dtype=torch.int64), tuple(classes))


def read_labels(table: Path, root: Path, paths: Sequence[str]) -> list[str]:
    """The label of each of ``paths`` in a CSV file ``path,label``; an empty string where there is none.

    A first line ``path,label`` is a heading. Paths are relative to ``root``.
    """
    if not table.is_file():
        raise UserError(f"dataset.labels names the file '{table}', which does not exist.")
    position = {path: i for i, path in enumerate(paths)}
    names: list[str | None] = [None] * len(paths)
    with table.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[0].strip().lower() in ("path", "file", "filename", "image")):
                continue
            if len(row) != 2:
                raise UserError(f"line {number} of '{table}' has {len(row)} columns; path,label are expected.")
            path, name = os.path.normpath(row[0].strip()), row[1].strip()
            at = position.get(path)
            if at is None:
                missing = "cannot be read as an image" if (root / path).is_file() else "does not exist"
                raise UserError(f"line {number} of '{table}' names '{row[0].strip()}', which {missing} below '{root}'.")
            if names[at] is not None:
                raise UserError(f"'{table}' names '{row[0].strip()}' twice (line {number}); keep one of the lines.")
            if name.startswith("-") and name != "-1":
                raise UserError(f"line {number} of '{table}' has the label {name}; only -1 (no label) may be negative.")
            names[at] = "" if name == "-1" else name
    if not any(names):
        raise UserError(f"'{table}' gives no image a label.")
    return [name or "" for name in names]


def _existing(place: Path, key: str) -> Path:
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{key} is '{place}', which {what}; name a folder of images.")
    return place


def _without_damaged(root: Path, paths: Sequence[str], bad: UnreadableFiles) -> list[str]:
    """``paths`` without the files whose first and last bytes give them away, which are noted in ``bad``."""
    reasons = {path: reason for path in paths if (reason := _damage(root / path)) is not None}
    bad.add(reasons.items())
    return [path for path in paths if path not in reasons]


def _damage(path: Path) -> str | None:
    try:
        if not looks_whole(path):
            read_image(path)
    except Unreadable as reason:
        return str(reason)
    return None
