"""`selfsight backbones`: which kinds of network learn by which methods, told by one step of each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from selfsight.backbones.families import Family, named
from selfsight.composition.catalogue import choices
from selfsight.datamodules.loading.loader import cores
from selfsight.engine.one_step import Row, tried
from selfsight.engine.tasks import in_order
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import in_folder, write_text
from selfsight.reporting.backbone_table import TITLES, cells, inserted, markdown, reasons
from selfsight.runs.console import make_console, make_table, quiet

#: a method for each thing that methods ask of a network: features of views of one size and of several, of turned
#: images, maps, maps of half the image, an average of the network, patches; others ask for what one of these does
METHODS = ("simclrv2", "supcon", "swav", "rotation", "pixpro", "spark", "simmatchv2", "mae")
WORTH_A_PROCESS = 8  # families: it takes some seconds to begin
WIDTH = 140  # of the table on the screen


def run(cfg: DictConfig) -> None:
    """Take the steps, show the table, write it where a file is named."""
    console = make_console()
    families, methods = named(cfg.families), methods_of(cfg.methods)
    rows = []
    with console.status("") as status:
        for row in rows_of(families, methods):
            rows.append(row)
            status.update(f"{row.family.title} ({len(rows)} of {len(families)})")
    rows.sort(key=lambda row: families.index(row.family))
    show(console, rows, methods)
    if cfg.families:
        for family in families:
            console.print(f"\n{family.title}: {', '.join(family.members())}", markup=False)
    if cfg.out is not None:
        path = in_folder(Path(cfg.out).expanduser())
        write_text(path, inserted(path.read_text() if path.is_file() else "# Backbones\n", markdown(rows, methods)))
        console.print(f"table: {path}", markup=False)


def rows_of(families: Sequence[Family], methods: Sequence[str]) -> Iterator[Row]:
    """Their rows as they are found: small steps leave a second core idle, so many families are tried side by side."""
    workers = max(1, min(len(families) // WORTH_A_PROCESS, cores()))
    alone = dict.fromkeys(families)  # none of them waits for another
    return (row for _, row in in_order(alone, functools.partial(quietly_tried, methods), workers))


def quietly_tried(methods: Sequence[str], family: Family) -> Row:
    quiet()
    return tried(family, methods)


def methods_of(words: Sequence[str] | None) -> list[str]:
    """The methods that are tried.

    Raises:
        UserError: there is no such method; names the nearest.
    """
    known = choices("method")
    if words is None:
        return [name for name in METHODS if name in known]
    for word in words:
        if word not in known:
            raise UserError(f"there is no method '{word}'.{nearest(str(word), known)}", status=USAGE)
    return list(words)


def show(console: Console, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """The table on the screen, and below it why not."""
    table = make_table(*TITLES, *methods, rows=(cells(row, methods) for row in rows))
    console.print(table, width=max(console.width, WIDTH))
    for line in reasons(rows, methods):
        console.print(f"  {line}", style="dim", markup=False)
