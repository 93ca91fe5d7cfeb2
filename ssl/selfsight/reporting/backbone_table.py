"""The table of which kinds of network learn by which methods, on the screen and in a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selfsight.backbones.families import LEFT_OUT
from selfsight.engine.one_step import Row

BEGIN, END = "<!-- table of `selfsight backbones` -->", "<!-- end of the table -->"
TITLES = ("family", "smallest member", "M parameters", "pixels", "sizes")


def cells(row: Row, methods: Iterable[str]) -> list[str]:
    """The columns of a row: family, smallest member, million parameters, pixels, sizes, and a mark for each method."""
    sizes = "" if row.side is None else "several" if row.several else "one"
    marks = ["–" if row.refusals[method] else "✓" for method in methods]
    side = "" if row.side is None else str(row.side)
    return [row.family.title, row.family.smallest, f"{row.parameters / 1e6:.1f}", side, sizes, *marks]


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
