"""report.html: one self-contained file with a run's curves, figures, embedding map, neighbours and pictures."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from selfsight.engine import measure
from selfsight.engine.measure import ROWS, describe
from selfsight.jobs.evaluate import trained_method
from selfsight.reporting import classification, embedding, embedding_map, pictures
from selfsight.reporting.page import figure_html, page, stroke
from selfsight.runs import records
from selfsight.runs.folder import RunFolder, write_atomically


def write(folder: RunFolder, cfg: DictConfig, data: Any, train: Any, test: Any, projection: str = "tsne") -> Path:
    """Write the report of a run from its metrics, its figures, its checkpoint and the features of its backbone.

    Args:
        train, test: frozen features of the data's un-augmented images; test is None where there are no such images.
        projection: of the map, one of `embedding.PROJECTIONS`.
    """
    parts = [
        heading(folder, cfg, data),
        table(folder.read_summary()),
        evaluations(folder),
        classification.section(folder),
        curves(folder.read_metrics(), cfg, data),
        *images_of_the_run(folder, cfg, data, train, test, projection),
        reproduce(folder, cfg),
    ]
    write_atomically(folder.report, page(folder.name, parts))
    return folder.report


def images_of_the_run(
    folder: RunFolder, cfg: DictConfig, data: Any, train: Any, test: Any, projection: str
) -> list[str]:
    """Map, neighbours, the method's own pictures, views."""
    parts = []
    split, shown = ("train", train) if test is None else ("test", test)
    if len(shown) >= 5:
        known = embedding.facts(train, shown, data.data.split(split), projection)
        kind = "training" if split == "train" else "test"
        parts.append(map_section(data, known, projection, kind))
        parts.append(pictures.neighbours(data, train, shown, known, kind))
    batch, images = pictures.viewed_batch(data)
    if folder.checkpoint.is_file():
        parts.append(pictures.galleries(trained_method(folder, cfg, data), batch, data))
    parts.append(pictures.views(batch, images, data))
    return parts


def map_section(data: Any, known: embedding.Facts, projection: str, kind: str) -> str:
    names = {"tsne": "t-SNE", "umap": "UMAP", "pca": "The two first principal components"}
    n = len(known.rows)
    about = f"{names[projection]} of the features of {n:,} {kind} images"
    if projection == "tsne" and n > embedding.FITTED:
        about += f"; {embedding.FITTED:,} fitted, the others placed between their nearest ones"
    about += (
        ". Distances between far groups mean little. Point at a dot to see its image; drag to move, scroll to zoom."
    )
    wide, high = np.ptp(known.flat, axis=0) if n > 1 else (1.0, 1.0)
    height = int(np.clip(140 + 960 * high / max(wide, 1e-9), 420, 760))  # the map keeps its proportions
    drawn = figure_html(embedding_map.figure(data, known), height, name="map", config={"scrollZoom": True})
    card = embedding_map.hover_card(data, known, "map")
    return f"<h2 id='embedding'>Embedding map</h2><p class='soft'>{about}</p>{drawn}{card}"


def heading(folder: RunFolder, cfg: DictConfig, data: Any) -> str:
    method = str(cfg.method._target_).rsplit(".", 1)[-1]
    return (
        f"<h1>{html.escape(folder.name)}</h1><p class='soft'>{html.escape(method)} · "
        f"{html.escape(str(cfg.backbone.get('name', '')))} · {html.escape(describe(data.data))} · "
        f"{cfg.trainer.max_epochs} epochs · batch {cfg.batch_size} · seed {cfg.seed}</p>"
        "<nav><a href='#good'>How good it is</a><a href='#training'>Training</a><a href='#embedding'>Embedding map</a>"
        "<a href='#neighbours'>Neighbours</a><a href='#views'>Views</a><a href='#again'>To do it again</a></nav>"
    )


#: column of metrics.csv and its title; columns without one stand at the end under their own name
TITLES = {
    "loss": "loss",
    "knn_top1": "kNN accuracy",
    "student_top1": "test accuracy",
    "teacher_top1": "test accuracy of the average",
    "view_knn_top1": "kNN of views",
    "rank": "effective rank",
    "feature_std": "feature spread",
    "lr": "learning rate",
    "alpha_req": "eigenvalue decay (alpha-ReQ)",
}
#: endings of the names of columns that are shares of 1
SHARES = ("_top1", "_accuracy", "_rate", "_share", "live_prototypes")
FEW_EPOCHS = 6
NO_CURVE = ("epoch", "step", "chance", "images_per_second", "seconds", "warning", "knn_top5", "rank_share")


def curves(rows: Sequence[Mapping[str, str]], cfg: DictConfig, data: Any) -> str:
    """One small chart per figure; what guessing would give is drawn in where it is known."""
    charts = []
    for column in curve_columns(rows):
        guess = chance(column, rows, data)
        charts.append(f"<div>{figure_html(curve({'': points(rows, column)}, column, guess), 260)}</div>")
    return f"<h2 id='training'>Training</h2><div class='grid'>{''.join(charts)}</div>" if charts else ""


def curve_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns worth a curve: those with titles first. The kNN of every k and offline evaluations are left out."""
    there = {column for row in rows for column, value in row.items() if value not in (None, "")}
    others = [column for row in rows[:1] for column in row if column not in TITLES and column not in NO_CURVE]
    others = [c for c in others if "/" not in c and not c.startswith("knn_k") and not c.endswith("_top5")]
    return [column for column in (*TITLES, *others) if column in there and len(points(rows, column)) > 0]


def points(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    return [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column) not in (None, "")]


def chance(column: str, rows: Sequence[Mapping[str, str]], data: Any) -> float | None:
    """What guessing gives, for the loss and for accuracies."""
    if column == "loss":
        known = [float(row["chance"]) for row in rows if row.get("chance") not in (None, "")]
        return known[-1] if known else None
    if column in ("knn_top1", "student_top1", "teacher_top1") and data.data.num_classes:
        return float(1 / data.data.num_classes)
    return 0.25 if column == "rotation_accuracy" else None


def curve(series: Mapping[str, Sequence[tuple[int, float]]], column: str, guess: float | None = None) -> Any:
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
    return made


def mark_chance(figure: Any, column: str, guess: float, values: Sequence[float]) -> None:
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


def evaluations(folder: RunFolder) -> str:
    """What was measured since: every record in ``eval/``, with its protocol."""
    parts = []
    for title, record in records.read(folder).items():
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(records.number(value))}</td></tr>"
            for name, value in records.figures(record["result"]).items()
        )
        stage = f", stage {record['stage']}" if "stage" in record else ""  # a detector has all of them
        parts.append(
            f"<h3>{html.escape(title)}</h3>"
            f"<p class='soft'>{html.escape(record['data'] + stage)}: {html.escape(record['protocol'])}</p>"
            f"<div class='wide'><table>{body}</table></div>"
        )
    inside = "".join(parts)
    return f"<details><summary>{len(parts)} further evaluations</summary>{inside}</details>" if parts else ""


def table(summary: Mapping[str, Any]) -> str:
    """Accuracy of pixels, untrained and pretrained network, with the protocol of each number below it."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    if not rows:
        return ""
    singles = [(key, title) for key, title in measure.SINGLES.items() if any(key in summary[row] for row in rows)]
    shots = sorted({k for row in rows for k in summary[row].get("few_shot", {})}, key=int)
    head = "".join(f"<th>{title}</th>" for _, title in singles)
    head += "".join(f"<th>{k} label{'s' * (k != '1')} a class</th>" for k in shots)
    body = ""
    for row, label in rows.items():
        values = summary[row]
        cells = "".join(
            f"<td>{measure.figure(key, values[key])}</td>" if key in values else "<td></td>" for key, _ in singles
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


def reproduce(folder: RunFolder, cfg: DictConfig) -> str:
    path = folder.path / "environment.json"
    environment = json.loads(path.read_text()) if path.is_file() else {}
    commands = [shlex.join(environment.get("command", [])), shlex.join(["selfsight", "report", f"run={folder.path}"])]
    commands[1:1] = [shlex.join(record["command"]) for record in records.read(folder).values() if "command" in record]
    packages = ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items() if v)
    machine = {
        "machine": f"{environment.get('platform', '')}, {environment.get('cpus', '?')} cores",
        "accelerators": ", ".join(environment.get("cuda", [])) or "none",
        "threads": environment.get("threads"),
        "Python": environment.get("python"),
        "packages": packages,
        "commit": environment.get("commit"),
    }
    about = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in machine.items() if value)
    settings = html.escape(OmegaConf.to_yaml(cfg, resolve=True))
    return (
        f"<h2 id='again'>To do it again</h2><pre>{html.escape(chr(10).join(c for c in commands if c))}</pre>"
        f"<dl>{about}</dl><details><summary>configuration</summary><pre>{settings}</pre></details>"
    )


def run(cfg: DictConfig) -> None:
    """Write the report of an existing run again, from what its folder holds."""
    import selfsight
    from selfsight.engine import build
    from selfsight.runs.console import make_console, quiet

    quiet()
    embedding.check_projection(cfg.projection)
    folder = RunFolder.open(cfg.run)
    of_run = folder.config()
    backbone = selfsight.load(folder.path).to(build.device(cfg.accelerator))
    data = build.datamodule(of_run, folder)
    make_console().print(f"report: {write(folder, of_run, data, *measure.features(backbone, data), cfg.projection)}")
