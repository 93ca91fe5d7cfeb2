"""Tables of labels: CSV files of ``path,label``. Needs no torch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from selfsight.datamodules.datasets.checks import composed, read_text, spellings
from selfsight.datamodules.datasets.search import ending, looked_into
from selfsight.datamodules.images.formats import EXTENSIONS
from selfsight.errors import UserError, nearest
from selfsight.validation import Kind

#: what ``dataset.labels`` may be, besides a path
RULES = ("auto", "folders", "none")
RULE = Kind(f"{', '.join(RULES)} or the path of a CSV file", lambda v: isinstance(v, (str, Path)))


def missing_table(root: Path, name: str) -> UserError:
    return UserError(f"dataset.labels names the file '{root / name}', which does not exist.{nearest(name, RULES)}")


class Table:
    """A CSV file of ``path,label``; the paths are relative to the folder ``base``.

    A first line whose path does not end as an image's, and is no file, is a heading. An empty label or -1 is none.
    Paths that look the same are the same: systems store accents in two ways.

    Args:
        exists: whether there is such a file.

    Raises:
        UserError: it cannot be read, is malformed, names an image twice, or gives none a label.
    """

    def __init__(self, file: Path, base: Path, exists: Callable[[Path], bool] = Path.is_file) -> None:
        self.file, self.base, self.exists = file, base, exists
        self._rows: dict[str, tuple[int, str]] = {}
        for position, (number, row) in enumerate(read_rows(file)):
            if len(row) != 2:
                columns = f"{len(row)} column{'s' * (len(row) > 1)}"
                raise UserError(
                    f"line {number} of '{file}' has {columns}; path,label are expected, with a comma between."
                )
            path, name = row
            if position == 0 and ending(path) not in EXTENSIONS and not exists(base / path):
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
        self._looks = {composed(place): place for place in self._rows}

    def names(self, part: Path, paths: Sequence[str]) -> list[str]:
        """The label of each of ``paths`` below ``part``; an empty string where there is none."""
        inside = os.path.relpath(part, self.base)
        places = paths if inside == os.curdir else [os.path.join(inside, path) for path in paths]
        rows = [place if place in self._rows else self._looks.get(composed(place)) for place in places]
        self._rest.difference_update(row for row in rows if row is not None)
        return ["" if row is None else self._rows[row][1] for row in rows]

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
