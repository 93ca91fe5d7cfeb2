"""`selfsight runs`: the run folders there are, what they learned, how far they are, how good they got."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from selfsight.errors import USAGE, UserError, nearest
from selfsight.reporting.run_list import FIGURES, NUMBERS, TEXTS, cells, conditions, fits, found, ordered, read
from selfsight.runs.console import make_console, make_table
from selfsight.runs.figures import heading

#: columns of text that a line in a file may take
WIDEST = 10_000


def run(cfg: DictConfig) -> None:
    console = make_console()
    places = [Path(str(folder)).expanduser() for folder in cfg.folders] or [Path("runs")]
    tests = conditions(cfg.where)
    known = [*TEXTS, *NUMBERS, *FIGURES]
    if cfg.sort not in known:
        raise UserError(
            f"sort is '{cfg.sort}', and one of {', '.join(known)} was expected.{nearest(str(cfg.sort), known)}",
            status=USAGE,
        )
    rows = [row for row in map(read, found(places)) if all(fits(row, *test) for test in tests)]
    if not rows:
        console.print(f"no run in {', '.join(map(str, places))}{' that fits' if tests else ''}")
        return
    shown = [name for name in FIGURES if any(name in row.figures for row in rows)]
    titles = ("run", "job", "method", "data", "state", "epochs", *map(heading, shown), "size", "changed")
    table = make_table(*titles, rows=(cells(row, shown) for row in ordered(rows, str(cfg.sort))))
    table.columns[0].overflow = "fold"  # a path is there to be copied
    if not console.is_terminal:  # a file is as wide as its lines
        console.width = max(console.width, console.measure(table, options=console.options.update(width=WIDEST)).maximum)
    console.print(table)
