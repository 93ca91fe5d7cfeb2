"""The curves of a training: a small chart for each figure, what guessing would give drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from selfsight.reporting.page import figure_html, stroke

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: column of metrics.csv and its title; columns without one stand at the end under their own name
TITLES = {
    "loss": "loss",
    "knn_top1": "kNN accuracy",
    "student_top1": "test accuracy",
    "teacher_top1": "test accuracy of the average",
    "knn_map": "kNN, mean average precision",
    "student_map": "mean average precision",
    "knn_r2": "kNN, R²",
    "student_r2": "R²",
    "view_knn_top1": "kNN of training views",
    "rank": "effective rank",
    "feature_std": "feature spread",
    "lr": "learning rate",
    "alpha_req": "eigenvalue decay (alpha-ReQ)",
}
#: endings of the names of columns that are shares of 1
SHARES = ("_top1", "_map", "_f1", "_accuracy", "_rate", "_share", "live_prototypes")
FEW_EPOCHS = 6
NO_CURVE = (
    "epoch",
    "step",
    "chance",
    "images_per_second",
    "seconds",
    "data_wait_share",
    "warning",
    "knn_top5",
    "knn_balanced",
    "rank_share",
)
#: what tells at a glance how a training went: of each row the first that there is, drawn larger and before the others
MAIN = (
    ("loss",),
    ("knn_top1", "student_top1", "knn_map", "student_map", "knn_r2", "student_r2", "view_knn_top1"),
    ("rank", "feature_std"),
)
#: least span of an axis: of shares of 1, and of other figures as a part of the largest, so that noise looks like noise
SPAN_OF_SHARES, SPAN = 0.1, 0.2


def curves(rows: Sequence[Mapping[str, str]], num_classes: int) -> str:
    """One small chart per figure; what guessing would give is drawn in where it is known."""

    def chart(column: str, height: int) -> str:
        guess = chance(column, rows, num_classes)
        return f"<div>{figure_html(curve({'': points(rows, column)}, column, guess), height)}</div>"

    there = curve_columns(rows)
    first = main_columns(there)
    if not there:
        return ""
    large = "".join(chart(column, 360) for column in first)
    small = "".join(chart(column, 230) for column in there if column not in first)
    return f"<h2 id='training'>Training</h2><div class='columns'>{large}</div><div class='grid'>{small}</div>"


def main_columns(there: Sequence[str]) -> list[str]:
    """Of the columns that there are those that matter most, at most three."""
    found = (next((column for column in row if column in there), None) for row in MAIN)
    return [column for column in found if column is not None]


def curve_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns worth a curve: those with titles first. The kNN of every k and offline evaluations are left out."""
    there = {column for row in rows for column, value in row.items() if value not in (None, "")}
    others = [column for row in rows[:1] for column in row if column not in TITLES and column not in NO_CURVE]
    others = [c for c in others if "/" not in c and not c.startswith("knn_k") and not c.endswith("_top5")]
    return [column for column in (*TITLES, *others) if column in there and len(points(rows, column)) > 0]


def points(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    return [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column) not in (None, "")]


def chance(column: str, rows: Sequence[Mapping[str, str]], num_classes: int) -> float | None:
    """What guessing gives, for the loss and for accuracies."""
    if column == "loss":
        known = [float(row["chance"]) for row in rows if row.get("chance") not in (None, "")]
        return known[-1] if known else None
    if column in ("knn_top1", "student_top1", "teacher_top1") and num_classes:
        return 1 / num_classes
    return 0.25 if column == "rotation_accuracy" else None


def curve(series: Mapping[str, Sequence[tuple[int, float]]], column: str, guess: float | None = None) -> go.Figure:
    """A chart of one column, a line a run."""
    import plotly.graph_objects as go

    made = go.Figure()
    for i, (name, values) in enumerate(series.items()):  # a run looks the same in every chart
        if values:
            x, y = zip(*values, strict=True)
            mode = "lines+markers" if len(x) < 40 else "lines"
            made.add_trace(go.Scatter(x=x, y=y, mode=mode, name=name, line=stroke(i)))
    if guess is not None:
        mark_chance(made, column, guess, [value for values in series.values() for _, value in values])
    made.update_layout(title=TITLES.get(column, column.replace("_", " ")), showlegend=len(series) > 1)
    made.update_xaxes(title="epoch", rangemode="nonnegative")
    if max((x for values in series.values() for x, _ in values), default=0) <= FEW_EPOCHS:
        made.update_xaxes(dtick=1)  # no half epochs
    if column.endswith(SHARES):
        made.update_yaxes(tickformat=".2~%", autorangeoptions={"clipmin": -0.02, "clipmax": 1.02})
    if (span := wider([y for values in series.values() for _, y in values], share=column.endswith(SHARES))) is not None:
        made.update_yaxes(autorangeoptions={"include": span})
    return made


def wider(values: Sequence[float], *, share: bool) -> list[float] | None:
    """Two values that an axis has to hold so that its span means something; None where the figures span it."""
    if not values:
        return None
    low, high = min(values), max(values)
    least = SPAN_OF_SHARES if share else SPAN * max(abs(low), abs(high))
    if high - low >= least:
        return None
    middle = (low + high) / 2
    if share:  # inside 0 to 1
        middle = min(max(middle, least / 2), 1 - least / 2)
    return [middle - least / 2, middle + least / 2]


def mark_chance(figure: go.Figure, column: str, guess: float, values: Sequence[float]) -> None:
    """Draw what guessing gives; where the line would flatten the curve, tell above the chart which way it lies."""
    low, high = min(values), max(values)
    beyond = max(low - guess, guess - high)
    if high == low or beyond <= 2 * (high - low):
        figure.add_hline(
            y=guess, line_dash="dot", line_color="#98a1ad", annotation_text="guessing",
            annotation_font_color="#707b8a", annotation_position="bottom right" if guess > low else "top right",
        )  # fmt: skip
        return
    below = guess < low
    text = f"{guess:.3g}" if not column.endswith(SHARES) else f"{guess:.2g}" if guess > 1 else f"{100 * guess:.3g}%"
    figure.add_annotation(
        text=f"{'↓' if below else '↑'} guessing: {text}", font_color="#707b8a", showarrow=False,
        x=1, xref="paper", xanchor="right", y=1, yref="paper", yanchor="bottom",
    )  # fmt: skip
