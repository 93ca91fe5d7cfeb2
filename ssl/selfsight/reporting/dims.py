"""Accuracy against the number of features: a curve for each evaluation that has looked at the first ones alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes.dims import BY_DIM
from selfsight.reporting.page import figure_html, stroke
from selfsight.reporting.tables import ROWS
from selfsight.runs.figures import SINGLES

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: by the name of a figure, of each network or evaluation: the figure by number of features
Curves = dict[str, dict[str, Mapping[str, float]]]


def section(summary: Mapping[str, Figures], evaluations: Mapping[str, Figures]) -> str:
    """A chart for each figure that is known by the number of features; empty where none is.

    Args:
        summary: of the run. evaluations: made since, by their titles.
    """
    found = curves({label: summary.get(row, {}) for row, label in ROWS.items()})
    for name, lines in curves({title: record["result"] for title, record in evaluations.items()}).items():
        found.setdefault(name, {}).update(lines)
    if not found:
        return ""
    charts = "".join(f"<div>{figure_html(chart(name, lines), 360)}</div>" for name, lines in found.items())
    return (
        "<h2 id='dims'>Accuracy by dimension</h2><p class='soft'>Of the first numbers of each feature alone, evaluated "
        f"as features of that width.</p><div class='columns'>{charts}</div>"
    )


def curves(results: Mapping[str, Figures]) -> Curves:
    """The curves among results, by figure and then by the results' names."""
    found: Curves = {}
    for label, result in results.items():
        for name, curve in result.items():
            if name.endswith(BY_DIM):
                found.setdefault(name.removesuffix(BY_DIM), {})[label] = curve
    return found


def chart(name: str, lines: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """One figure against the number of features, which is drawn by its logarithm."""
    import plotly.graph_objects as go

    made = go.Figure()
    for i, (label, curve) in enumerate(lines.items()):
        x, y = [int(m) for m in curve], list(curve.values())
        made.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=label, line=stroke(i)))
    numbers = sorted({int(m) for curve in lines.values() for m in curve})
    made.update_layout(title=SINGLES.get(name, name.replace("_", " ")), showlegend=True)
    made.update_xaxes(title="features", type="log", tickvals=numbers, ticktext=[str(m) for m in numbers])
    if not name.endswith("_r2"):
        made.update_yaxes(tickformat=".2~%")
    return made
