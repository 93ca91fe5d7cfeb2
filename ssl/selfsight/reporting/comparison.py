"""What a comparison has found: its rows on disk, as a table, and as a page."""

from __future__ import annotations

import csv
import html
import io
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from selfsight.files import write_text
from selfsight.reporting.page import figure_html, html_table, page, stroke
from selfsight.runs.console import make_table

TABLE = "comparison.csv"
COLUMNS = ("approach", "labels_per_class", "seed", "accuracy")

Row = tuple[str, int, int, float]


def read(path: Path) -> list[Row]:
    """The rows of a comparison that are finished."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        return [(r["approach"], int(r["labels_per_class"]), int(r["seed"]), float(r["accuracy"])) for r in found]


def write(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=os.linesep)
    writer.writerow(COLUMNS)
    writer.writerows((*row[:3], f"{row[3]:.6f}") for row in rows)
    write_text(path, text.getvalue())


def cells(rows: Sequence[Row], name: str, labels: int) -> tuple[float, float, int]:
    """Mean and standard deviation over seeds of a cell of the table, and how many there are."""
    found = [row[3] for row in rows if row[:2] == (name, labels)]
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def cell_text(rows: Sequence[Row], name: str, labels: int) -> str:
    mean, spread, count = cells(rows, name, labels)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if count > 1 else f"{100 * mean:.1f} %"


def title(labels: int) -> str:
    return f"{labels} label{'s' * (labels != 1)} a class"


def show(console: Console, rows: Sequence[Row], cfg: DictConfig) -> None:
    table = make_table("", *[title(labels) for labels in cfg.labels_per_class])
    for name in cfg.approaches:
        table.add_row(str(name), *[cell_text(rows, name, labels) for labels in cfg.labels_per_class])
    console.print(table)
    console.print(about(cfg), style="dim")


def about(cfg: DictConfig) -> str:
    """What the figures are."""
    of_seeds = f"mean and standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"
    return f"Test accuracy after the last epoch, {of_seeds}"


def told(rows: Sequence[Row], cfg: DictConfig) -> str:
    """The comparison as one self-contained page: picture with error bars, table, settings."""
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
    titles = ["", *(title(labels) for labels in cfg.labels_per_class)]
    cells_of = [
        [str(name), *(cell_text(rows, name, labels) for labels in cfg.labels_per_class)] for name in cfg.approaches
    ]
    settings = html.escape(OmegaConf.to_yaml(cfg, resolve=True))
    return page(
        "few labels",
        [
            f"<h1>Few labels on {html.escape(str(cfg.dataset.name))}</h1>",
            f"<p class='soft'>{about(cfg)}; labels differ from seed to seed and are the same for all approaches.</p>",
            figure_html(figure, 480),
            html_table("", titles, cells_of),
            f"<details><summary>configuration</summary><pre>{settings}</pre></details>",
        ],
    )
