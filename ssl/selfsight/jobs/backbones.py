"""`selfsight backbones`: which kinds of network learn by which methods, told by one step of each."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from selfsight.backbones.families import FAMILIES, LEFT_OUT, Family
from selfsight.composition.catalogue import choices
from selfsight.datamodules.loading.loader import cores
from selfsight.engine.one_step import Row, tried
from selfsight.engine.tasks import in_order
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import write_text
from selfsight.runs.console import make_console, make_table, quiet

#: a method for each thing that methods ask of a network: features of views of one size and of several, of turned
#: images, maps, maps of half the image, an average of the network, patches; others ask for what one of these does
METHODS = ("simclrv2", "supcon", "swav", "rotation", "pixpro", "spark", "simmatchv2", "mae")
WORTH_A_PROCESS = 8  # families: it takes some seconds to begin
WIDTH = 140  # of the table on the screen
BEGIN, END = "<!-- table of `selfsight backbones` -->", "<!-- end of the table -->"


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
        path = Path(cfg.out).expanduser()
        if not path.parent.is_dir():
            raise UserError(f"there is no folder '{path.parent}' to write '{path.name}' into; make it first.")
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


def named(words: Sequence[str]) -> list[Family]:
    """The families that are meant: by their titles, parts of them, or the name of a member.

    Raises:
        UserError: there is no such family; names the nearest.
    """
    found: list[Family] = []
    titles = {_plain(family.title): family for family in FAMILIES}
    for word in words:
        plain = _plain(str(word))
        chosen = [titles[plain]] if plain in titles else [f for title, f in titles.items() if plain in title]
        chosen = chosen or [family for family in FAMILIES if str(word) in family.members()]
        if not chosen:
            known = [family.title for family in FAMILIES]
            raise UserError(f"there is no family of networks '{word}'.{nearest(str(word), known)}", status=USAGE)
        found += [family for family in chosen if family not in found]
    return found or list(FAMILIES)


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


# --- the table -------------------------------------------------------------------------------------------------------


def cells(row: Row, methods: Iterable[str]) -> list[str]:
    """The columns of a row: family, smallest member, million parameters, pixels, sizes, and a mark for each method."""
    sizes = "" if row.side is None else "several" if row.several else "one"
    marks = ["–" if row.refusals[method] else "✓" for method in methods]
    side = "" if row.side is None else str(row.side)
    return [row.family.title, row.family.smallest, f"{row.parameters / 1e6:.1f}", side, sizes, *marks]


TITLES = ("family", "smallest member", "M parameters", "pixels", "sizes")


def reasons(rows: Iterable[Row], methods: Iterable[str]) -> list[str]:
    """A line for each reason why a method and some families do not go together."""
    found: dict[tuple[str, str], list[str]] = {}
    for method in methods:
        for row in rows:
            if row.refusals[method]:
                found.setdefault((method, row.refusals[method]), []).append(row.family.title)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # what holds for all methods is said once
    for (method, reason), families in found.items():
        merged.setdefault((reason, tuple(families)), []).append(method)
    return [f"{', '.join(names)} · {', '.join(families)}: {reason}" for (reason, families), names in merged.items()]


def show(console: Console, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """The table on the screen, and below it why not."""
    table = make_table(*TITLES, *methods)
    for row in rows:
        table.add_row(*cells(row, methods))
    console.print(table, width=max(console.width, WIDTH))
    for line in reasons(rows, methods):
        console.print(f"  {line}", style="dim", markup=False)


def markdown(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """The table as Markdown, with the reasons and the networks that are left out."""
    header = [*TITLES, *methods]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cells(row, methods))} |" for row in rows]
    lines += ["", "Why not:", "", *(f"- {line}" for line in reasons(rows, methods))]
    lines += ["", "Left out, because timm lacks them and they are longer than a page; nearest:", ""]
    lines += [f"- {name}: {instead}" for name, instead in LEFT_OUT.items()]
    return "\n".join(lines)


def inserted(page: str, table: str) -> str:
    """A page with the table in its place, or at its end."""
    block = f"{BEGIN}\n\n{table}\n\n{END}"
    if BEGIN in page and END in page:
        before, _, rest = page.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{page.rstrip()}\n\n{block}\n"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
