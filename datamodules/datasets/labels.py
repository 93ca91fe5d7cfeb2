"""The labels of a folder's images: from a table, from class folders, or none, with a line that says which and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from selfsight.contracts import REGRESSION, Targets
from selfsight.datamodules.datasets.checks import RULES, composed, missing_table
from selfsight.datamodules.datasets.search import TABLE
from selfsight.datamodules.datasets.tables import RULE, TASKS, Table
from selfsight.datamodules.images.prepared import TABLE as TABLE_OF_SHARDS
from selfsight.datamodules.images.sets import known
from selfsight.errors import UserError
from selfsight.validation import expect, one_of


@dataclass(frozen=True)
class Labels:
    """``labels [N]`` int64 (-1: none) or None, the names of the classes, and where they are from or why there are none.

    ``suspicious``: the images look as if they should have labels. ``targets``: several labels or numbers of each image,
    in place of classes.
    """

    labels: Tensor | None
    classes: tuple[str, ...]
    origin: str
    suspicious: bool = False
    targets: Targets | None = None

    @property
    def known(self) -> Tensor | None:
        """``[N]`` bool: images of which anything is known; None where nothing is of any."""
        return known(self.labels, self.targets)


class Labeller:
    """Labels of the images in parts of a folder.

    Args:
        root: the whole folder.
        rule: see `folders.folder`.
        exists: whether there is such a file.
        beside: names of the classes that stand with the images themselves, empty where there is none; for ``auto``.
        task: what a table holds, see `Table`. origin: where those of ``beside`` are from.

    Raises:
        UserError: a rule that is neither a word nor a path.
    """

    def __init__(
        self,
        root: Path,
        rule: str,
        exists: Callable[[Path], bool] = Path.is_file,
        beside: Callable[[Path, Sequence[str]], list[str]] | None = None,
        task: str = "auto",
        origin: str = "",
    ) -> None:
        expect("dataset.labels", rule, RULE)
        self.origin = origin
        self.beside, self.task = beside, expect("dataset.task", task, one_of(*TASKS))
        self.root, self.rule, self.exists = root, str(rule), exists
        self._tables: dict[Path, Table] = {}

    def __call__(self, part: Path, paths: Sequence[str], like: Labels | None = None) -> Labels:
        """Labels of the images ``paths`` below ``part``; ``like``, of other images, fixes the classes or columns.

        Raises:
            UserError: a table that is missing, malformed or gives none of the images a label; no class folders where
                some are asked for; a class or column that is not among those of ``like``.
        """
        classes, table = None if like is None else like.classes, self._table(part)
        if table is not None and table.columns:
            targets = _like(table.targets(part, paths), None if like is None else like.targets, table.file)
            if like is None and not bool(targets.known.any()):
                self.check_tables()
                raise UserError(f"'{table.file}' gives no image in '{part}' a label.")
            return Labels(None, (), f"'{table.file}', {targets}", targets=targets)
        if table is None and self.task not in ("auto", "classes"):
            raise UserError(
                f"dataset.task is {self.task}, and '{part}' has no {TABLE}: name a CSV file of path,label with "
                "dataset.labels=FILE."
            )
        if table is not None:
            names = table.names(part, paths)
            if any(names) or (classes is not None and self.rule != "auto"):
                return _numbered(names, classes, f"'{table.file}'", part)
            if classes is None:
                self.check_tables()
                raise UserError(f"'{table.file}' gives no image in '{part}' a label.")
        if self.rule == "auto" and self.beside is not None and any(names := self.beside(part, paths)):
            return _numbered(names, classes, self.origin, part)
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
            table.check_rest()

    def _table(self, part: Path) -> Table | None:
        """The table of ``rule``, which lies in the part's own folder or in the root."""
        if self.rule in RULES[1:]:
            return None
        name = TABLE if self.rule == "auto" else self.rule
        for place in (self.root,) if os.path.isabs(name) else (part, self.root):
            file = place / name
            if file not in self._tables and file.is_file():
                self._tables[file] = Table(file, place, self.exists, self.task)
            if file in self._tables:
                return self._tables[file]
        if self.rule == "auto":
            return None
        raise missing_table(self.root, name)


def _like(targets: Targets, other: Targets | None, file: Path) -> Targets:
    """The targets with the columns of others, in their order; labels that no image here has are 0."""
    if other is None or targets.names == other.names:
        return targets
    more = sorted(set(targets.names) - set(other.names))
    lacking = [name for name in other.names if name not in targets.names]
    if more or (lacking and other.kind == REGRESSION):
        told = f"'{more[0]}', which the images to learn from do not have" if more else f"no column '{lacking[0]}'"
        raise UserError(f"'{file}' has {told}: give both the same columns.")
    place = {name: column for column, name in enumerate(targets.names)}
    columns = [targets.values[:, place[name]] if name in place else None for name in other.names]
    absent = targets.values.new_zeros(len(targets)).where(targets.known, torch.nan)
    return replace(other, values=torch.stack([absent if column is None else column for column in columns], dim=1))


def _numbered(names: Sequence[str], classes: Sequence[str] | None, origin: str, part: Path) -> Labels:
    """Names as numbers: their place in ``classes``, by default in the sorted names, numbers sorted as such.

    Names that look the same are the same, however their accents are stored.
    """
    names = list(map(composed, names))
    given = {name for name in names if name}
    if classes is None:
        classes = sorted(given, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    number = {composed(name): i for i, name in enumerate(classes)} | {"": -1}
    unknown = sorted(given - set(number))
    if unknown:
        raise UserError(f"'{part}' has the class '{unknown[0]}', which the images to learn from do not have.")
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
