"""The labels of a folder's images: from a table, from class folders, or none, with a line that says which and why."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfsight.datamodules.datasets.checks import read_text
from selfsight.datamodules.images.decode import EXTENSIONS
from selfsight.datamodules.images.prepared import TABLE as TABLE_OF_SHARDS
from selfsight.errors import UserError, nearest
from selfsight.validation import Kind, expect

RULES = ("auto", "folders", "none")
RULE = Kind(f"{', '.join(RULES)} or the path of a CSV file", lambda v: isinstance(v, (str, Path)))
#: what ``auto`` looks for
TABLE = "labels.csv"


@dataclass(frozen=True)
class Labels:
    """``labels [N]`` int64 (-1: none) or None, the names of the classes, and where they are from or why there are none.

    ``suspicious``: the images look as if they should have labels.
    """

    labels: Tensor | None
    classes: tuple[str, ...]
    origin: str
    suspicious: bool = False


class Labeller:
    """Labels of the images in parts of a folder.

    Args:
        root: the whole folder.
        rule: see `folders.folder`.
        exists: whether there is such a file.

    Raises:
        UserError: a rule that is neither a word nor a path.
    """

    def __init__(self, root: Path, rule: str, exists: Callable[[Path], bool] = Path.is_file) -> None:
        expect("dataset.labels", rule, RULE)
        self.root, self.rule, self.exists = root, str(rule), exists
        self._tables: dict[Path, Table] = {}

    def __call__(self, part: Path, paths: Sequence[str], classes: Sequence[str] | None = None) -> Labels:
        """Labels of the images ``paths`` below ``part``; ``classes`` fixes the classes.

        Raises:
            UserError: a table that is missing, malformed or gives none of the images a label; no class folders where
                some are asked for; a class that is not among ``classes``.
        """
        table = self._table(part)
        if table is not None:
            names = table.names(part, paths)
            if any(names) or (classes is not None and self.rule != "auto"):
                return _numbered(names, classes, f"'{table.file}'", part)
            if classes is None:
                self.check_tables()
                raise UserError(f"'{table.file}' gives no image in '{part}' a label.")
        first = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        if self.rule == "folders":
            outside = first.count("")
            if outside:
                raise UserError(
                    f"{outside} images lie directly in '{part}', outside any class folder: move them, or set "
                    "dataset.labels=none."
                )
        elif self.rule == "none":
            return Labels(None, (), "dataset.labels=none")
        elif "" in first or (len(set(first)) < 2 and not classes):
            return _none(part, paths, first)
        return _numbered(first, classes, f"the folders in '{part}'", part)

    def check_tables(self) -> None:
        """Refuse what no part has asked the tables for and what is no image.

        A table may name images that are not used: damaged ones, or those of a further test folder.
        """
        for table in self._tables.values():
            table.check_rest(self.exists)

    def _table(self, part: Path) -> Table | None:
        """The table of ``rule``, which lies in the part's own folder or in the root."""
        if self.rule in RULES[1:]:
            return None
        name = TABLE if self.rule == "auto" else self.rule
        for place in (self.root,) if os.path.isabs(name) else (part, self.root):
            file = place / name
            if file not in self._tables and file.is_file():
                self._tables[file] = Table(file, place)
            if file in self._tables:
                return self._tables[file]
        if self.rule == "auto":
            return None
        raise UserError(
            f"dataset.labels names the file '{self.root / name}', which does not exist.{nearest(name, RULES)}"
        )


class Table:
    """A CSV file of ``path,label``; the paths are relative to the folder ``base``.

    A first line whose path does not end as an image's is a heading. An empty label or -1 is none.

    Raises:
        UserError: it cannot be read, is malformed, names an image twice, or gives none a label.
    """

    def __init__(self, file: Path, base: Path) -> None:
        self.file, self.base = file, base
        self._rows: dict[str, tuple[int, str]] = {}
        for position, (number, row) in enumerate(read_rows(file)):
            if len(row) != 2:
                columns = f"{len(row)} column{'s' * (len(row) > 1)}"
                raise UserError(
                    f"line {number} of '{file}' has {columns}; path,label are expected, with a comma between."
                )
            path, name = row
            if position == 0 and not _like_an_image(path):
                continue
            place = relative(path, base)
            if place in self._rows:
                raise UserError(f"'{file}' names '{path}' twice (line {number}); keep one of the lines.")
            if name.startswith("-") and name != "-1":
                raise UserError(f"line {number} of '{file}' has the label {name}; only -1 (no label) may be negative.")
            self._rows[place] = number, "" if name == "-1" else name
        if not any(name for _, name in self._rows.values()):
            raise UserError(f"'{file}' gives no image a label.")
        self._rest = set(self._rows)

    def names(self, part: Path, paths: Sequence[str]) -> list[str]:
        """The label of each of ``paths`` below ``part``; an empty string where there is none."""
        inside = os.path.relpath(part, self.base)
        places = paths if inside == os.curdir else [os.path.join(inside, path) for path in paths]
        self._rest.difference_update(places)
        return [self._rows[place][1] if place in self._rows else "" for place in places]

    def check_rest(self, exists: Callable[[Path], bool]) -> None:
        """Refuse a path that nobody has asked for and that is none of an image."""
        for number, path in sorted((self._rows[path][0], path) for path in self._rest):
            if not exists(self.base / path):
                raise UserError(
                    f"line {number} of '{self.file}' names '{path}', which does not exist in '{self.base}'."
                )
            if not _like_an_image(path):
                raise UserError(f"line {number} of '{self.file}' names '{path}', which is no image.")


def read_rows(file: Path) -> list[tuple[int, list[str]]]:
    """Line and columns of every row of a CSV file that is not empty.

    Raises:
        UserError: it cannot be read.
    """
    reader = csv.reader(io.StringIO(read_text(file), newline=""))
    try:
        return [(reader.line_num, [column.strip() for column in row]) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of '{file}' is no row of a table: {error}.") from None


def relative(path: str, base: Path) -> str:
    """A path in a table, as seen from the folder ``base``."""
    return os.path.relpath(path, base) if os.path.isabs(path) else os.path.normpath(path)


def _like_an_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _numbered(names: Sequence[str], classes: Sequence[str] | None, origin: str, part: Path) -> Labels:
    """Names as numbers: their place in ``classes``, by default in the sorted names, numbers sorted as such."""
    given = {name for name in names if name}
    if classes is None:
        classes = sorted(given, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    unknown = sorted(given - set(classes))
    if unknown:
        raise UserError(f"'{part}' has the class '{unknown[0]}', which the images to learn from do not have.")
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Labels(torch.tensor([number[name] for name in names], dtype=torch.int64), tuple(classes), origin)


def _none(part: Path, paths: Sequence[str], first: Sequence[str]) -> Labels:
    """No labels by ``auto``, and whether the images look as if they should have some."""
    outside, classes = first.count(""), set(first) - {""}
    within = {path.split(os.sep)[1] for path in paths if path.count(os.sep) > 1}
    tables = sorted({place.name for place in part.glob("*.csv") if place.is_file()} - {TABLE_OF_SHARDS})
    if len(classes) > 1:
        why = f"{outside} of {len(first)} images in '{part}' lie outside its class folders"
        return Labels(None, (), f"{why}: move them, or set dataset.labels=none", suspicious=True)
    if tables:
        why = f"'{part}' has no {TABLE}, and '{tables[0]}' was not read"
        return Labels(None, (), f"{why}: set dataset.labels={tables[0]} if it holds path,label", suspicious=True)
    if len(within) > 1 and not outside:
        inner = part / next(iter(classes))
        why = f"all images lie in '{inner}'"
        return Labels(None, (), f"{why}: set dataset.root={inner} if its folders are classes", suspicious=True)
    return Labels(None, (), f"the images in '{part}' lie in no class folders and there is no {TABLE}")
