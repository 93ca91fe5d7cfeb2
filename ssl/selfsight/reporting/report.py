"""report.html: one self-contained file with a run's curves, figures, embedding map, neighbours and pictures."""

from __future__ import annotations

import html
import json
import shlex
from pathlib import Path

import numpy as np

from selfsight.datamodules import DataModule
from selfsight.engine.about_data import describe
from selfsight.engine.reload import LoadedRun
from selfsight.evaluation import Features
from selfsight.files import write_text
from selfsight.reporting import classification, dims, embedding, embedding_map, pictures
from selfsight.reporting.curves import curves
from selfsight.reporting.page import figure_html, page
from selfsight.reporting.tables import table
from selfsight.reporting.thumbnails import about_pictures
from selfsight.runs import records
from selfsight.runs.folder import RunFolder


def write(run: LoadedRun, train: Features, test: Features | None, projection: str = "tsne") -> Path:
    """Write the report of a run from its metrics, its figures, its method and the features of its backbone.

    Args:
        train, test: frozen features of the data's un-augmented images; test is None where there are no such images.
        projection: of the map, one of `embedding.PROJECTIONS`.
    """
    folder, data = run.folder, run.datamodule
    parts = [
        table(summary := folder.read_summary()),
        dims.section(summary, records.read(folder)),
        evaluations(folder),
        classification.section(folder),
        curves(folder.read_metrics(), data.data.num_classes),
        *images_of_the_run(run, train, test, projection),
        reproduce(folder, run.description.settings),
    ]
    write_text(folder.report, page(folder.name, [heading(run, there="".join(parts)), *parts]))
    return folder.report


def images_of_the_run(run: LoadedRun, train: Features, test: Features | None, projection: str) -> list[str]:
    """Map, neighbours, the method's own pictures, views."""
    train, test = train.in_memory(), None if test is None else test.in_memory()
    parts, data = [], run.datamodule
    split, shown = ("train", train) if test is None else ("test", test)
    if len(shown) >= 5:
        known = embedding.build_map(train, shown, data.data.split(split), projection)
        kind = "training" if split == "train" else "test"
        parts.append(map_section(data, known, projection, kind))
        parts.append(pictures.neighbours(data, train, shown, known, kind))
    batch, images = pictures.viewed_batch(data)
    if run.method is not None:
        parts.append(pictures.galleries(run.method, batch, data))
    parts.append(pictures.views(batch, images, data))
    return parts


def map_section(data: DataModule, known: embedding.EmbeddingMap, projection: str, kind: str) -> str:
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


#: titles of sections, by their anchors
SECTIONS = {
    "good": "How good it is", "dims": "Accuracy by dimension", "training": "Training", "embedding": "Embedding map",
    "neighbours": "Neighbours", "views": "Views", "again": "To do it again",
}  # fmt: skip


def heading(run: LoadedRun, there: str) -> str:
    """What the run is, and links to the sections.

    Args:
        there: the sections; some runs do not have all of them.
    """
    names = run.description
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, title in SECTIONS.items() if f"id='{name}'" in there)
    return (
        f"<h1>{html.escape(run.folder.name)}</h1><p class='soft'>{html.escape(names.method_class)} · "
        f"{html.escape(names.backbone)} · {html.escape(describe(run.datamodule.data))} · "
        f"{names.epochs} epochs · batch {names.batch_size} · seed {names.seed}</p>"
        + (f"<p class='soft'>{about}</p>" if (about := about_pictures(run.datamodule.data.bands)) else "")
        + f"<nav>{links}</nav>"
    )


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


def reproduce(folder: RunFolder, settings: str) -> str:
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
    return (
        f"<h2 id='again'>To do it again</h2><pre>{html.escape(chr(10).join(c for c in commands if c))}</pre>"
        f"<dl>{about}</dl><details><summary>configuration</summary><pre>{html.escape(settings)}</pre></details>"
    )
