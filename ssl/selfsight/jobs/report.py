"""report.html: one self-contained file with a run's curves, table, embedding map and neighbours."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from selfsight.jobs.measure import ROWS, class_name, describe
from selfsight.jobs.run_folder import RunFolder, write_atomically

MAPPED = 2000  # images on the map
THUMBNAILS = 350  # of them drawn as pictures
NEIGHBOURS = 8

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea; --accent: #2f5fd0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 24px 20px 60px; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; margin: 10px 0; } .wide { overflow-x: auto; }
th, td { padding: 7px 14px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.best td { font-weight: 600; }
pre { background: #f5f7fa; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; line-height: 1.45; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
.grid > div { min-width: 0; }
.row { display: flex; gap: 6px; align-items: center; margin: 6px 0; flex-wrap: wrap; }
.row img { width: 56px; height: 56px; object-fit: contain; image-rendering: pixelated;
           border: 3px solid transparent; border-radius: 5px; }
.row img.query { border-color: var(--accent); margin-right: 12px; } .row img.wrong { border-color: #d3482e; }
"""


def write(folder: RunFolder, cfg: DictConfig, data: Any, train: Any, test: Any) -> Path:
    """Write the report of a run from its metrics, its summary and the features of its backbone.

    Args:
        train, test: frozen features of the data's un-augmented images.
    """
    parts = [
        heading(folder, cfg, data),
        curves(folder.read_metrics()),
        table(folder.read_summary()),
        embedding_map(data, test),
        neighbour_rows(data, train, test),
        reproduce(folder, cfg),
    ]
    from plotly.offline import get_plotlyjs

    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>"
    )
    write_atomically(folder.report, page)
    return folder.report


def heading(folder: RunFolder, cfg: DictConfig, data: Any) -> str:
    method = str(cfg.method._target_).rsplit(".", 1)[-1]
    return (
        f"<h1>{html.escape(folder.name)}</h1><p class='soft'>{html.escape(method)} · "
        f"{html.escape(str(cfg.backbone.get('name', '')))} · {html.escape(describe(data.data))} · "
        f"{cfg.trainer.max_epochs} epochs · batch {cfg.batch_size} · seed {cfg.seed}</p>"
    )


def figure_html(figure: Any, height: int = 300) -> str:
    figure.update_layout(
        height=height,
        margin={"l": 50, "r": 15, "t": 40, "b": 40},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        colorway=["#2f5fd0", "#d3722e", "#2e9a6b", "#8a4fc7", "#c2405f"],
    )
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return text


#: column of metrics.csv, title, whether it is a share
CURVES = (
    ("loss", "loss", False),
    ("knn_top1", "kNN accuracy", True),
    ("view_knn_top1", "kNN of views", True),
    ("rank", "effective rank", False),
    ("feature_std", "feature spread", False),
    ("lr", "learning rate", False),
)


def curves(rows: Sequence[Mapping[str, str]]) -> str:
    """One small chart per figure; the loss of guessing is drawn in where the method knows it."""
    import plotly.graph_objects as go

    charts = []
    for column, title, share in CURVES:
        points = [(int(r["epoch"]), float(r[column])) for r in rows if r.get(column) not in (None, "")]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        figure = go.Figure(go.Scatter(x=x, y=y, mode="lines+markers" if len(x) < 40 else "lines", name=title))
        chance = [float(r["chance"]) for r in rows if column == "loss" and r.get("chance") not in (None, "")]
        if chance:
            figure.add_hline(y=chance[-1], line_dash="dot", line_color="#999", annotation_text="guessing")
        figure.update_layout(title=title, showlegend=False)
        figure.update_xaxes(title="epoch")
        if share:
            figure.update_yaxes(tickformat=".0%")
        charts.append(f"<div>{figure_html(figure)}</div>")
    return f"<h2>Training</h2><div class='grid'>{''.join(charts)}</div>" if charts else ""


def table(summary: Mapping[str, Any]) -> str:
    """Accuracy of pixels, untrained and pretrained network, with the protocol of each number below it."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    if not rows:
        return ""
    singles = [
        (key, title)
        for key, title in (("knn_top1", "kNN"), ("linear_top1", "linear probe"), ("view_knn_top1", "kNN of views"))
        if any(key in summary[row] for row in rows)
    ]
    shots = sorted({k for row in rows for k in summary[row].get("few_shot", {})}, key=int)
    head = "".join(f"<th>{title}</th>" for _, title in singles)
    head += "".join(f"<th>{k} label{'s' * (k != '1')} a class</th>" for k in shots)
    body = ""
    for row, label in rows.items():
        values = summary[row]
        cells = "".join(f"<td>{values[key]:.1%}</td>" if key in values else "<td></td>" for key, _ in singles)
        for k in shots:
            shot = values.get("few_shot", {}).get(k)
            cells += f"<td>{100 * shot['mean']:.1f} ± {100 * shot['std']:.1f} %</td>" if shot else "<td></td>"
        body += f"<tr{' class=best' if row == 'pretrained' else ''}><td>{label}</td>{cells}</tr>"
    notes = "".join(
        f"<p class='soft'>{html.escape(n)}: {html.escape(p)}</p>" for n, p in summary.get("protocols", {}).items()
    )
    return f"<h2>How good it is</h2><div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div>{notes}"


def thumbnail(image: np.ndarray, side: int = 64) -> str:
    """``[H, W, 3]`` uint8 as a PNG data address, at most ``side`` pixels wide."""
    from PIL import Image

    picture = Image.fromarray(image)
    if max(picture.size) > side:
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def embedding_map(data: Any, test: Any) -> str:
    """t-SNE of the test features, coloured by class, some of the points drawn as their images."""
    if len(test) < 5:
        return ""
    import plotly.graph_objects as go
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(test))[:MAPPED])
    x = test.x[chosen].numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, max(2.0, (len(x) - 1) / 4))
    flat = TSNE(init="pca" if min(x.shape) >= 2 else "random", perplexity=perplexity, random_state=0).fit_transform(x)
    labels = None if test.labels is None else test.labels[chosen].numpy()
    figure = go.Figure()
    for group in [None] if labels is None else np.unique(labels).tolist():
        inside = slice(None) if group is None else labels == group
        name = "images" if group is None else class_name(data.data, group)
        figure.add_trace(
            go.Scattergl(
                x=flat[inside, 0], y=flat[inside, 1], mode="markers", name=name,
                marker={"size": 9 if len(x) < 800 else 5, "opacity": 0.75},
                text=[f"{name}, image {i}" for i in test.indices[chosen][inside].tolist()], hoverinfo="text",
            )
        )  # fmt: skip
    width = float(np.ptp(flat[:, 0])) or 1.0
    for i in rng.permutation(len(chosen))[:THUMBNAILS].tolist():
        figure.add_layout_image(
            source=thumbnail(data.data.split("test").read(int(test.indices[chosen[i]])), 24),
            x=float(flat[i, 0]), y=float(flat[i, 1]), xref="x", yref="y", sizex=width / 45, sizey=width / 45,
            xanchor="center", yanchor="middle", layer="above",
        )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    figure.update_layout(legend={"itemsizing": "constant"})
    return (
        f"<h2>Embedding map</h2><p class='soft'>t-SNE of {len(x)} test images' features (perplexity {perplexity:g}); "
        "distances between far groups mean little.</p>" + figure_html(figure, 680)
    )


def neighbour_rows(data: Any, train: Any, test: Any, queries: int = 12) -> str:
    """For some test images, the training images closest to them by cosine."""
    import torch.nn.functional as F

    bank, x = F.normalize(train.x, dim=1), F.normalize(test.x, dim=1)
    step = max(1, math.ceil(len(test) / queries))
    rows = []
    for i in range(0, len(test), step):
        closest = (x[i] @ bank.T).topk(min(NEIGHBOURS, len(train))).indices.tolist()
        pictures = [
            f"<img class='query' alt='image' src='{thumbnail(data.data.split('test').read(int(test.indices[i])))}'>"
        ]
        for j in closest:
            wrong = test.labels is not None and train.labels is not None and bool(test.labels[i] != train.labels[j])
            source = thumbnail(data.data.split("train").read(int(train.indices[j])))
            pictures.append(f"<img {'class=wrong ' if wrong else ''}alt='neighbour' src='{source}'>")
        rows.append(f"<div class='row'>{''.join(pictures)}</div>")
    note = "" if test.labels is None else " A red frame marks a neighbour of another class."
    about = f"<p class='soft'>Test image (blue), then its closest training images.{note}</p>"
    return f"<h2>Nearest neighbours</h2>{about}{''.join(rows)}"


def reproduce(folder: RunFolder, cfg: DictConfig) -> str:
    path = folder.path / "environment.json"
    environment = json.loads(path.read_text()) if path.is_file() else {}
    command = " ".join(environment.get("command", []))
    packages = ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items() if v)
    settings = html.escape(OmegaConf.to_yaml(cfg, resolve=True))
    return (
        f"<h2>To do it again</h2><pre>{html.escape(command)}</pre><p class='soft'>{html.escape(packages)}</p>"
        f"<details><summary>configuration</summary><pre>{settings}</pre></details>"
    )


def run(cfg: DictConfig) -> None:
    """Write the report of an existing run again, from what its folder holds."""
    import selfsight
    from selfsight.jobs import build, measure
    from selfsight.jobs.console import make_console, quiet

    quiet()
    folder = RunFolder.open(cfg.run)
    of_run = folder.config()
    backbone = selfsight.load(folder.path).to(build.device(cfg.accelerator))
    data = build.datamodule(of_run)
    make_console().print(f"report: {write(folder, of_run, data, *measure.features(backbone, data))}")
