"""What a run that learns classes leaves behind: figures of its networks on the test images, in numbers and pictures."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from selfsight.evaluation.probes import classification
from selfsight.files import write_text
from selfsight.methods.base import Method
from selfsight.reporting.page import figure_html
from selfsight.runs.console import make_table
from selfsight.runs.folder import RunFolder

FILE = "classification.json"
LAST = 20  # evaluations whose median is reported
DRAWN = 40  # classes up to which the confusion picture names them


def record(console: Console, folder: RunFolder, method: Method, data: Any) -> dict[str, Any]:
    """Measure the method's `classifiers`, show them, and keep everything in ``classification.json``.

    Returns:
        For the summary: the figures without the confusion; nothing where no class is learned or no test image has one.
    """
    test = data.data.test
    if not method.classifiers() or test is None or test.labels is None:
        return {}
    found = {}
    for name, network in method.classifiers().items():
        figures = classification.classification_figures(
            *classification.predict(network, data.eval_dataloader("test"), method.device)
        )
        found[name] = {**figures, **over_epochs(folder.read_metrics(), f"{name}_top1")}
    content = {"classes": list(data.data.classes), "classifiers": found}
    write_text(folder.path / FILE, json.dumps(content, indent=2) + "\n")
    table = make_table("", "top-1", "best", f"median of last {LAST}", "top-5", "calibration error")
    for name, row in found.items():
        table.add_row(name, *(percent(row.get(key)) for key in ("top1", "best_top1", "median_top1", "top5", "ece")))
    console.print(table)
    return {name: {k: v for k, v in row.items() if k != "confusion"} for name, row in found.items()}


def over_epochs(rows: Sequence[Mapping[str, str]], column: str) -> dict[str, float]:
    """``best_top1``, which is chosen on the test images, and ``median_top1`` of the last `LAST` evaluations."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return {"best_top1": max(values), "median_top1": statistics.median(values[-LAST:])} if values else {}


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def section(folder: RunFolder) -> str:
    """HTML of ``classification.json``: accuracy of every class and which is taken for which; empty without the file."""
    path = folder.path / FILE
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
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


def confusion_picture(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
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
