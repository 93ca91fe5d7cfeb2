"""The run folders there are, a row each: what a run learned, how far it is, how good it got."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from omegaconf import OmegaConf

from selfsight.errors import USAGE, UserError, nearest
from selfsight.runs import figures, records
from selfsight.runs.folder import RUNS, RunFolder
from selfsight.trust import Trust, trusting

FINISHED, UNFINISHED, EMPTY, DAMAGED = "finished", "unfinished", "no epoch yet", "damaged"
DEEPEST = 3  #: a run is looked for in a folder, in those within it, and in theirs


@dataclass(frozen=True)
class Row:
    """A run folder.

    Attributes:
        run: its path. state: `FINISHED`, `UNFINISHED` (it is running or was stopped), `EMPTY`, `DAMAGED`.
        epochs: done. planned: as many as the run has. size: of the folder in bytes. changed: seconds since 1970.
        figures: of its summary, by name.
    """

    run: str
    job: str
    method: str
    data: str
    state: str
    epochs: int
    planned: int
    size: int
    changed: float
    figures: Mapping[str, float]


#: column: what it is sorted by
TEXTS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "job": lambda row: row.job,
    "method": lambda row: row.method,
    "data": lambda row: row.data,
    "state": lambda row: row.state,
}
NUMBERS: dict[str, Callable[[Row], float]] = {
    "epochs": lambda row: row.epochs,
    "size": lambda row: row.size,
    "changed": lambda row: row.changed,
}
FIGURES = (*figures.SINGLES, *figures.CLASSIFIERS)


def found(places: Sequence[Path]) -> Iterator[RunFolder]:
    """The run folders in some folders, each once.

    Raises:
        UserError: there is no such folder.
    """
    seen = set()
    for place in places:
        if not place.is_dir():
            raise UserError(f"there is no folder '{place}' to look for runs in; name it: selfsight runs FOLDER.")
        for depth in range(DEEPEST + 1):
            for file in sorted(place.glob("/".join(["*"] * depth + ["config.yaml"]))):
                if (folder := file.parent).resolve() not in seen and folder.name != ".hydra":
                    seen.add(folder.resolve())
                    yield RunFolder(folder)


def read(folder: RunFolder) -> Row:
    """What a folder says of itself; what cannot be read is told as its state."""
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    changed = max(path.stat().st_mtime for path in files)
    try:
        with trusting(Trust(everything=True)):  # a list builds nothing of what it reads
            cfg, job = folder.config(), folder.job
        epochs, summary = len(folder.read_metrics()), folder.read_summary()
        values = {name: value.mean for name, value in figures.of_run(summary).items()}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return Row(str(folder.path), "", "", "", DAMAGED, 0, 0, size, changed, {})
    planned = int(OmegaConf.select(cfg, "trainer.max_epochs") or 0)
    state = FINISHED if summary or job not in RUNS else UNFINISHED if epochs or folder.began else EMPTY
    kind = str(OmegaConf.select(cfg, "method._target_") or "").rpartition(".")[2]
    method = str(OmegaConf.select(cfg, "choices.method") or kind)
    data = records.data_name(cfg.dataset) if "dataset" in cfg else ""
    return Row(str(folder.path), job, method, data, state, epochs, planned, size, changed, values)


def conditions(where: str | None) -> list[tuple[str, str]]:
    """Column and pattern of each condition in ``state=unfinished,method=swav``.

    Raises:
        UserError: one names no column of words.
    """
    tests = []
    for word in filter(None, (word.strip() for word in str(where or "").split(","))):
        column, equals, pattern = word.partition("=")
        if column not in TEXTS or not equals:
            raise UserError(
                f"where has '{word}'; COLUMN=VALUE was expected, with a column of {', '.join(TEXTS)}."
                f"{nearest(column, TEXTS)}",
                status=USAGE,
            )
        tests.append((column, pattern))
    return tests


def fits(row: Row, column: str, pattern: str) -> bool:
    value = TEXTS[column](row)
    return fnmatchcase(value, pattern) or (column == "run" and fnmatchcase(Path(value).name, pattern))


def ordered(rows: Sequence[Row], column: str) -> list[Row]:
    """Words from A to Z; numbers from the highest, those without one at the end."""
    if column in TEXTS:
        return sorted(rows, key=TEXTS[column])
    number = NUMBERS.get(column, lambda row: row.figures.get(column, float("-inf")))
    return sorted(rows, key=number, reverse=True)


def cells(row: Row, shown: Sequence[str]) -> list[str]:
    epochs = f"{row.epochs}/{row.planned}" if row.planned else ""
    values = [figures.as_text(name, row.figures[name]) if name in row.figures else "" for name in shown]
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.changed))
    return [row.run, row.job, row.method, row.data, row.state, epochs, *values, f"{row.size / 1e6:.1f} MB", changed]
