"""What a run that learns classes leaves behind: figures of its networks on the test images, in numbers and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from selfsight.engine.measure import LAST
from selfsight.evaluation.base import Figures
from selfsight.reporting.page import figure_html
from selfsight.runs.console import make_table
from selfsight.runs.folder import RunFolder

if TYPE_CHECKING:
    import plotly.graph_objects as go

DRAWN = 40  # classes up to which the confusion picture names them


def show_classifiers(console: Console, classifiers: Mapping[str, Figures]) -> None:
    """A table of the networks that learned classes; nothing where none did."""
    if not classifiers:
        return
    table = make_table("", "top-1", "best", f"median of last {LAST}", "top-5", "calibration error")
    for name, row in classifiers.items():
        table.add_row(name, *(percent(row.get(key)) for key in ("top1", "best_top1", "median_top1", "top5", "ece")))
    console.print(table)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def section(folder: RunFolder) -> str:
    """HTML of ``classification.json``: accuracy of every class and which is taken for which; empty without the file."""
    if not folder.classification.is_file():
        return ""
    content = json.loads(folder.classification.read_text())
    parts = ["<h2>Classes</h2>"]
    for name, figures in content["classifiers"].items():
        line = " · ".join(
            f"{title} {percent(figures[key])}"
            for key, title in (
                ("top1", "top-1 (last epoch)"),
                ("best_top1", "best epoch"),
                ("median_top1", f"median of the last {LAST}"),
                ("top5", "top-5"),
                ("ece", "calibration error"),
            )
            if key in figures
        )
        parts.append(f"<p>{html.escape(name)}: {line}</p>")
        parts.append(f"<p class='soft'>{html.escape(by_class(figures['per_class'], content['classes']))}</p>")
        parts.append(figure_html(confusion_picture(figures["confusion"], content["classes"]), 460))
    return "".join(parts)


def by_class(shares: Sequence[float | None], classes: Sequence[str]) -> str:
    """Accuracy of the classes that have test images, the worst first; of many classes those alone."""
    known = sorted((share, name) for share, name in zip(shares, classes, strict=True) if share is not None)
    more = f" … and {len(known) - DRAWN} better ones" if len(known) > DRAWN else ""
    return "Accuracy by class: " + " · ".join(f"{name} {percent(share)}" for share, name in known[:DRAWN]) + more


def confusion_picture(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> go.Figure:
    """A heat map: rows are true classes, columns answers, colour the share of the row."""
    import plotly.graph_objects as go

    shares = [[n / max(1, sum(row)) for n in row] for row in confusion]
    names = [f"{name} " for name in classes]  # the blank keeps names that are numbers from becoming an axis of numbers
    text = confusion if len(classes) <= DRAWN else None
    figure = go.Figure(
        go.Heatmap(
            z=shares, x=names, y=names, text=text, texttemplate="%{text}" if text else None, colorscale="Blues", zmin=0,
            zmax=1, colorbar={"tickformat": ".0%"},
            hovertemplate="%{y} taken for %{x}: %{z:.1%}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(title="true class (row) and answer (column)")
    figure.update_yaxes(autorange="reversed")
    return figure
