"""What a comparison has found: its rows on disk, as a table, and as a page."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from selfsight.engine.options import FIGURES
from selfsight.evaluation.base import Figures
from selfsight.reporting.page import figure_html, html_table, page, stroke
from selfsight.runs import records
from selfsight.runs.comparison import Row
from selfsight.runs.console import make_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def figures(cfg: DictConfig) -> Sequence[str]:
    """The figures of its runs that a comparison is about; none where it is about numbers of labels."""
    return cfg.get("figures") or []  # comparisons of before have no such key


def columns(cfg: DictConfig) -> list[int | str]:
    """What a comparison has a column for: figures of its runs, or numbers of labels."""
    return list(figures(cfg) or cfg.labels_per_class)


def cells(rows: Sequence[Row], name: str, column: int | str) -> tuple[float, float, int]:
    """Mean and standard deviation over seeds of a cell of the table, and how many there are; not a number without."""
    found = [row[3] for row in rows if row[:2] == (name, column) and not math.isnan(row[3])]
    mean = statistics.fmean(found) if found else math.nan
    return mean, statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def cell_text(rows: Sequence[Row], name: str, column: int | str) -> str:
    mean, spread, count = cells(rows, name, column)
    if not count:
        return "–"
    if column == "seconds":
        return f"{mean:.0f} ± {spread:.0f} s" if count > 1 else f"{mean:.0f} s"
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if count > 1 else f"{100 * mean:.1f} %"


def title(column: int | str) -> str:
    if isinstance(column, str):
        return FIGURES[column]
    return f"{column} label{'s' * (column != 1)} a class"


def titles_of(cfg: DictConfig) -> list[str]:
    """The titles of the table's columns."""
    return ["", *(title(column) for column in columns(cfg))]


def lines_of(rows: Sequence[Row], cfg: DictConfig) -> list[list[str]]:
    """The lines of the table, one an approach."""
    return [[str(name), *(cell_text(rows, name, column) for column in columns(cfg))] for name in cfg.approaches]


def show(console: Console, rows: Sequence[Row], cfg: DictConfig) -> None:
    console.print(make_table(*titles_of(cfg), rows=lines_of(rows, cfg)))
    console.print(about(cfg), style="dim")


def about(cfg: DictConfig) -> str:
    """What the figures are."""
    of_seeds = f"mean and standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"
    what = "Test accuracies" if figures(cfg) else "Test accuracy"
    return f"{what} after the last epoch, {of_seeds}"


def told(rows: Sequence[Row], cfg: DictConfig) -> str:
    """The comparison as one self-contained page: picture with error bars, table, settings."""
    name, few = html.escape(records.data_name(cfg.dataset)), not figures(cfg)
    settings = html.escape(OmegaConf.to_yaml(cfg, resolve=True))
    labels = "; labels differ from seed to seed and are the same for all approaches" if few else ""
    return page(
        "few labels" if few else "methods",
        [
            f"<h1>{'Few labels' if few else 'Methods'} on {name}</h1>",
            f"<p class='soft'>{about(cfg)}{labels}.</p>",
            figure_html(against_labels(rows, cfg), 480) if few else figure_html(side_by_side(rows, cfg), 640),
            html_table("", titles_of(cfg), lines_of(rows, cfg)),
            f"<details><summary>configuration</summary><pre>{settings}</pre></details>",
        ],
    )


def against_labels(rows: Sequence[Row], cfg: DictConfig) -> Figure:
    """Accuracy against labels a class, a line an approach."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, name in enumerate(cfg.approaches):
        found = [cells(rows, name, labels) for labels in cfg.labels_per_class]
        spread = {"type": "data", "array": [s for _, s, _ in found], "visible": cfg.seeds > 1}
        # side by side, so that no error bar hides another
        places = [labels * 1.03 ** (i - (len(cfg.approaches) - 1) / 2) for labels in cfg.labels_per_class]
        figure.add_scatter(
            x=places,
            y=[mean for mean, _, _ in found],
            error_y=spread,
            mode="lines+markers",
            name=str(name),
            line=stroke(i),
        )
    figure.update_xaxes(type="log", title="labels a class", tickvals=list(cfg.labels_per_class))
    figure.update_yaxes(title="test accuracy", tickformat=".0%")
    return figure


def side_by_side(rows: Sequence[Row], cfg: DictConfig) -> Figure:
    """Approaches one below the other, a mark for each share among the figures."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = [str(name) for name in cfg.approaches]
    for i, column in enumerate(column for column in columns(cfg) if column != "seconds"):
        found = [cells(rows, name, column) for name in names]
        figure.add_scatter(
            x=[None if math.isnan(mean) else mean for mean, _, _ in found],
            y=names,
            error_x={"type": "data", "array": [s for _, s, _ in found], "visible": cfg.seeds > 1},
            mode="markers",
            name=title(column),
            marker={"color": stroke(i)["color"], "size": 9},
        )
    figure.update_xaxes(title="test accuracy", tickformat=".0%")
    figure.update_yaxes(autorange="reversed", dtick=1)
    return figure


def figure_of(summary: Figures, figure: str, step: DictConfig, *, trained: bool = True) -> float:
    """A figure of a run's summary, not a number where it has none.

    Args:
        trained: it is of the trained network, and not of what stands beside that in the run's table.
    """
    kind, _, rest = figure.rpartition("_")
    found: Any
    if figure == "seconds":
        found = summary.get("train_seconds") if trained else None
    elif figure == "classifier_top1":
        found = summary.get("classifiers", {}).get(step.get("measured", "student"), {}).get("top1") if trained else None
    else:
        row = summary.get(step.get("row", "pretrained"), {})
        found = row.get("few_shot", {}).get(rest, {}).get("mean") if kind == "few_shot" else row.get(figure)
    return math.nan if found is None else float(found)
