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
    titles = {key: title for key, title in TITLES.items() if any(key in row for row in classifiers.values())}
    rows = ([name, *(as_read(key, row.get(key)) for key in titles)] for name, row in classifiers.items())
    console.print(make_table("", *titles.values(), rows=rows))


#: figures of a network on the test images, in the order in which they are told
TITLES = {
    "top1": "top-1",
    "best_top1": "best",
    "median_top1": f"median of last {LAST}",
    "top5": "top-5",
    "ece": "calibration error",
    "map": "mAP",
    "best_map": "best mAP",
    "median_map": f"median of last {LAST}",
    "f1": "F1",
    "r2": "R²",
    "best_r2": "best R²",
    "median_r2": f"median of last {LAST}",
}


def in_full(key: str) -> str:
    """A title for where there is no table around it: which epoch it is of."""
    of, _, what = key.partition("_")
    if of == "best":
        return f"{TITLES[what]} (best epoch)"
    if of == "median":
        return f"{TITLES[what]} (median of the last {LAST})"
    return f"{TITLES[key]} (last epoch)" if f"best_{key}" in TITLES else TITLES[key]


def as_read(key: str, value: float | None) -> str:
    """A figure of a network as a person reads it."""
    return f"{value:.3f}" if value is not None and key.endswith("r2") else percent(value)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def section(folder: RunFolder) -> str:
    """HTML of ``classification.json``: accuracy of every class and which is taken for which; empty without the file."""
    if not folder.classification.is_file():
        return ""
    content = json.loads(folder.classification.read_text())
    parts = ["<h2>Classes</h2>"]
    for name, figures in content["classifiers"].items():
        line = " · ".join(f"{in_full(key)} {as_read(key, figures[key])}" for key in TITLES if key in figures)
        parts.append(f"<p>{html.escape(name)}: {line}</p>")
        if "confusion" not in figures:  # several labels, or numbers
            parts.append(f"<p class='soft'>{html.escape(by_column(figures))}</p>")
            continue
        parts.append(f"<p class='soft'>{html.escape(by_class(figures['per_class'], content['classes']))}</p>")
        parts.append(figure_html(confusion_picture(figures["confusion"], content["classes"]), 460))
    return "".join(parts)


def by_class(shares: Sequence[float | None], classes: Sequence[str]) -> str:
    """Accuracy of the classes that have test images, the worst first; of many classes those alone."""
    known = sorted((share, name) for share, name in zip(shares, classes, strict=True) if share is not None)
    more = f" … and {len(known) - DRAWN} better ones" if len(known) > DRAWN else ""
    return "Accuracy by class: " + " · ".join(f"{name} {percent(share)}" for share, name in known[:DRAWN]) + more


def by_column(figures: Figures) -> str:
    """The figure of each label or number, the worst first; empty where there is one alone."""
    named = next((key for key in ("map_of", "r2_of") if key in figures), None)
    if named is None:
        return ""
    known = sorted((value, name) for name, value in figures[named].items())
    key, title = ("r2", "R²") if named == "r2_of" else ("map", "Average precision")
    more = f" … and {len(known) - DRAWN} better ones" if len(known) > DRAWN else ""
    return f"{title} of each: " + " · ".join(f"{name} {as_read(key, value)}" for value, name in known[:DRAWN]) + more


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
