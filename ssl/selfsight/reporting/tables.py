"""The table of a run: raw pixels, the untrained and the pretrained network under the same protocols."""

from __future__ import annotations

import html
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from selfsight.engine import measure
from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes import diagnostics
from selfsight.runs import records
from selfsight.runs.console import make_table

#: rows of the table, from nothing learnt to what was learnt here
ROWS = {
    "largest": "largest class",
    "pixels": "raw pixels",
    "untrained": "untrained",
    "pretrained": "pretrained",
}


def table(summary: Mapping[str, Figures]) -> str:
    """Accuracy of pixels, untrained and pretrained network, with the protocol of each number below it."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    if not rows:
        return ""
    columns = measure.singles(summary[row] for row in rows)
    shots = sorted({k for row in rows for k in summary[row].get("few_shot", {})}, key=int)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    head += "".join(f"<th>{k} label{'s' * (k != '1')} a class</th>" for k in shots)
    body = ""
    for row, label in rows.items():
        values = summary[row]
        cells = "".join(
            f"<td>{measure.figure(key, values[key])}</td>" if key in values else "<td></td>" for key in columns
        )
        for k in shots:
            shot = values.get("few_shot", {}).get(k)
            cells += f"<td>{100 * shot['mean']:.1f} ± {100 * shot['std']:.1f} %</td>" if shot else "<td></td>"
        body += f"<tr{' class=best' if row == 'pretrained' else ''}><td>{label}</td>{cells}</tr>"
    notes = "".join(
        f"<p class='soft'>{html.escape(n)}: {html.escape(p)}</p>" for n, p in summary.get("protocols", {}).items()
    )
    return (
        f"<h2 id='good'>How good it is</h2><div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div>{notes}"
    )


def show_run(console: Console, summary: Mapping[str, Figures], protocols: Mapping[str, str]) -> None:
    """The table of a run: raw pixels, untrained and pretrained network under the same protocols."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    shots = sorted({k for key in rows for k in summary[key].get("few_shot", {})}, key=int)
    columns = measure.singles(summary[row] for row in rows)
    table = make_table("", *columns.values(), *[f"{k}/class" for k in shots])
    for row, label in rows.items():
        values = summary[row]
        cells = ["" if key not in values else measure.figure(key, values[key]) for key in columns]
        for k in shots:
            shot = values.get("few_shot", {}).get(k)
            cells.append("" if shot is None else f"{100 * shot['mean']:.1f} ± {100 * shot['std']:.1f}%")
        table.add_row(label, *cells)
    console.print(table)
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
    table = make_table("stage", *names)
    for stage, row in rows.items():
        table.add_row(stage, *(records.number(row[name]) for name in names))
    console.print(table)
