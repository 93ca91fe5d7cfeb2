"""Tables of labels: CSV files of ``path,label``, of several labels, or of numbers."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from selfsight.contracts import MULTILABEL, REGRESSION, Targets
from selfsight.datamodules.datasets.checks import RULES, composed, read_text, spellings
from selfsight.datamodules.datasets.search import ending, looked_into
from selfsight.datamodules.images.formats import EXTENSIONS
from selfsight.errors import UserError
from selfsight.validation import Kind

RULE = Kind(f"{', '.join(RULES)} or the path of a CSV file", lambda v: isinstance(v, (str, Path)))


#: what ``dataset.task`` may be
TASKS = ("auto", "classes", MULTILABEL, REGRESSION)


class Table:
    """A CSV file of ``path,label``; the paths are relative to the folder ``base``.

    A first line whose path does not end as an image's, and is no file, is a heading. An empty label or -1 is none.
    Paths that look the same are the same: systems store accents in two ways.

    In place of a class a table may hold several labels of each image (``path,dog|sea``, or a column of 0 and 1 for each
    label), or numbers, in one or several columns; an empty field is not known. Several columns have a heading.

    Args:
        exists: whether there is such a file.
        task: ``classes``, ``multilabel``, ``regression``, or ``auto``: several labels where a ``|`` stands in the only
            column, or all columns are of 0 and 1; numbers where there are other columns, or one of fractions alone;
            else classes.

    Attributes:
        kind: one of `TASKS`, but for ``auto``. columns: of targets.

    Raises:
        UserError: it cannot be read, is malformed, names an image twice, gives none a label, or has a text where a
            number was expected.
    """

    def __init__(
        self, file: Path, base: Path, exists: Callable[[Path], bool] = Path.is_file, task: str = "auto"
    ) -> None:
        self.file, self.base, self.exists = file, base, exists
        self._rows: dict[str, tuple[int, list[str]]] = {}
        heading: list[str] = []
        width = 2
        for position, (number, row) in enumerate(read_rows(file)):
            path, *cells = row
            if position == 0 and len(row) > 1 and ending(path) not in EXTENSIONS and not exists(base / path):
                heading, width = cells, len(row)
                continue
            if len(row) != width:
                columns = f"{len(row)} column{'s' * (len(row) > 1)}"
                expected = "path,label are" if width == 2 else f"{','.join(['path', *heading])} are"
                several = "" if heading or len(row) < 3 else ", or a first line with the names of the columns"
                raise UserError(
                    f"line {number} of '{file}' has {columns}; {expected} expected, with a comma between{several}."
                )
            place = relative(path, base)
            if place in self._rows:
                raise UserError(f"'{file}' names '{path}' twice (line {number}); keep one of the lines.")
            self._rows[place] = number, cells
        self.kind = _kind([cells for _, cells in self._rows.values()], task)
        if self.kind == "classes":
            self.columns: tuple[str, ...] = ()
            self._check_classes(width)
        elif self.kind == MULTILABEL and width == 2:
            self.columns = tuple(sorted({name for _, (cell,) in self._rows.values() for name in _several(cell)}))
        else:
            self.columns = tuple(heading or ["value"])
        if self.columns:
            self._values_of = {place: self._values(number, cells) for place, (number, cells) in self._rows.items()}
        if not any(cell for _, cells in self._rows.values() for cell in cells):
            raise UserError(f"'{file}' gives no image a label.")
        self._rest = set(self._rows)
        self._looks = {composed(place): place for place in self._rows}

    def names(self, part: Path, paths: Sequence[str]) -> list[str]:
        """The class of each of ``paths`` below ``part``; an empty string where there is none."""
        return ["" if row is None else self._rows[row][1][0] for row in self._found(part, paths)]

    def targets(self, part: Path, paths: Sequence[str]) -> Targets:
        """The labels or numbers of each of ``paths`` below ``part``."""
        nothing = [math.nan] * len(self.columns)
        values = [nothing if row is None else self._values_of[row] for row in self._found(part, paths)]
        return Targets(torch.tensor(values, dtype=torch.float32), self.columns, self.kind)

    def _found(self, part: Path, paths: Sequence[str]) -> list[str | None]:
        """The row of each of ``paths`` below ``part``."""
        inside = os.path.relpath(part, self.base)
        places = paths if inside == os.curdir else [os.path.join(inside, path) for path in paths]
        rows = [place if place in self._rows else self._looks.get(composed(place)) for place in places]
        self._rest.difference_update(row for row in rows if row is not None)
        return rows

    def _check_classes(self, width: int) -> None:
        for place, (number, cells) in self._rows.items():
            if width != 2:
                raise UserError(f"'{self.file}' has {width} columns; path,label are expected of dataset.task=classes.")
            if cells[0].startswith("-") and cells[0] != "-1":
                raise UserError(
                    f"line {number} of '{self.file}' has the label {cells[0]}; only -1 (no label) may be negative."
                )
            self._rows[place] = number, ["" if cells[0] == "-1" else cells[0]]

    def _values(self, line: int, cells: Sequence[str]) -> list[float]:
        """A row as numbers; NaN for an empty field."""
        if self.kind == MULTILABEL and len(cells) == 1:
            there = set(_several(cells[0]))
            return [float(name in there) if cells[0] else math.nan for name in self.columns]
        values = [math.nan if cell == "" else _number(cell) for cell in cells]
        for cell, value, name in zip(cells, values, self.columns, strict=True):
            fits = value in (0, 1) if self.kind == MULTILABEL else value is not None
            if cell and not fits:
                raise UserError(
                    f"line {line} of '{self.file}' has '{cell}' in the column '{name}', where "
                    f"{'0 or 1' if self.kind == MULTILABEL else 'a number'} was expected: mend it, empty it where it "
                    "is not known, or leave the column out."
                )
        return [math.nan if value is None else value for value in values]

    def check_rest(self) -> None:
        """Refuse a path that nobody has asked for and that is none of an image.

        Raises:
            UserError: it does not exist, or holds no image.
        """
        for number, path in sorted((self._rows[path][0], path) for path in self._rest):
            there = next((name for name in spellings(path) if self.exists(self.base / name)), None)
            if there is None:
                raise UserError(
                    f"line {number} of '{self.file}' names '{path}', which does not exist in '{self.base}'."
                )
            file = self.base / there
            if file.is_file() and looked_into(file) is None:
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


def _kind(rows: Sequence[Sequence[str]], task: str) -> str:
    """What the cells of a table are, see `Table`."""
    if task != "auto" or not rows:
        return "classes" if task == "auto" else task
    cells = [cell for row in rows for cell in row if cell]
    values = [_number(cell) for cell in cells]
    if len(rows[0]) > 1:
        return MULTILABEL if all(value in (0, 1) for value in values) else REGRESSION
    if any("|" in cell for cell in cells):
        return MULTILABEL
    fractions = None not in values and any(value % 1 for value in values if value is not None)
    return REGRESSION if fractions else "classes"


def _number(cell: str) -> float | None:
    """The finite number that a field holds; None for anything else."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _several(cell: str) -> list[str]:
    """The labels in a field; a lone ``|`` is none of them."""
    return [composed(name.strip()) for name in cell.split("|") if name.strip()]
