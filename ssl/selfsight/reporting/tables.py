"""The table of a run: raw pixels, the untrained and the pretrained network under the same protocols."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes import diagnostics
from selfsight.runs import figures, records
from selfsight.runs.console import make_table

#: rows of the table, from nothing learnt to what was learnt here
ROWS = {
    "largest": "largest class",
    "pixels": "raw pixels",
    "untrained": "untrained",
    "pretrained": "pretrained",
}


def rows_of(summary: Mapping[str, Figures]) -> dict[str, Figures]:
    """The rows of the table that a summary has, by their titles."""
    return {label: summary[key] for key, label in ROWS.items() if key in summary}


def shots_of(rows: Iterable[Figures]) -> list[str]:
    """The numbers of labels a class that there are accuracies for."""
    return sorted({k for row in rows for k in row.get("few_shot", {})}, key=int)


def singles_of(row: Figures, columns: Iterable[str]) -> list[str]:
    """The cells of the figures that are one number."""
    return [figures.as_text(key, row[key]) if key in row else "" for key in columns]


def few_shot_of(row: Figures, shots: Iterable[str], percent: str) -> list[str]:
    """The cells of accuracies from few labels a class, with their spread and the sign ``percent``."""
    found = [row.get("few_shot", {}).get(k) for k in shots]
    return [f"{100 * one['mean']:.1f} ± {100 * one['std']:.1f}{percent}" if one else "" for one in found]


def table(summary: Mapping[str, Figures]) -> str:
    """Accuracy of pixels, untrained and pretrained network, with the protocol of each number below it."""
    rows = rows_of(summary)
    if not rows:
        return ""
    columns, shots = figures.singles(rows.values()), shots_of(rows.values())
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    head += "".join(f"<th>{k} label{'s' * (k != '1')} a class</th>" for k in shots)
    body = ""
    for label, row in rows.items():
        cells = "".join(f"<td>{cell}</td>" for cell in (*singles_of(row, columns), *few_shot_of(row, shots, " %")))
        body += f"<tr{' class=best' if label == ROWS['pretrained'] else ''}><td>{label}</td>{cells}</tr>"
    notes = "".join(
        f"<p class='soft'>{html.escape(n)}: {html.escape(p)}</p>" for n, p in summary.get("protocols", {}).items()
    )
    return (
        f"<h2 id='good'>How good it is</h2><div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div>{notes}"
    )


def show_run(console: Console, summary: Mapping[str, Figures], protocols: Mapping[str, str]) -> None:
    """The table of a run: raw pixels, untrained and pretrained network under the same protocols."""
    rows = rows_of(summary)
    columns, shots = figures.singles(rows.values()), shots_of(rows.values())
    lines = [[label, *singles_of(row, columns), *few_shot_of(row, shots, "%")] for label, row in rows.items()]
    console.print(make_table("", *columns.values(), *[f"{k}/class" for k in shots], rows=lines))
    for name, told in protocols.items():
        console.print(f"  {name}: {told}", style="dim", highlight=False)


def show_figures(console: Console, result: Figures) -> None:
    """A table of the figures; beside those that have one, what is normal. The alarm, where one rings."""
    table = Table(show_header=False, box=None)
    for name, value in records.figures(result).items():
        normal = [diagnostics.FIGURES[name].normal] if name in diagnostics.FIGURES else []
        table.add_row(name, records.number(value), *normal)
    console.print(table)
    alarm = diagnostics.judge({name: value for name, value in result.items() if isinstance(value, float)})
    if alarm:
        console.print(f"[yellow]warning[/yellow] {alarm}")


def show_stages(console: Console, results: Mapping[str, Figures]) -> None:
    """A row for each stage; the kNN of every k is left out."""
    rows = {stage: records.figures(result) for stage, result in results.items()}
    names = [name for name in next(iter(rows.values())) if not name.startswith("knn_k")]
    lines = ([stage, *(records.number(row[name]) for name in names)] for stage, row in rows.items())
    console.print(make_table("stage", *names, rows=lines))
