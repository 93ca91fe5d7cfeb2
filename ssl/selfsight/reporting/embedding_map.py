"""The map of an embedding: its images as points in a plane, coloured by what is known of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from selfsight.datamodules import DataModule
from selfsight.engine.about_data import NO_LABEL, class_name
from selfsight.reporting.embedding import EmbeddingMap
from selfsight.reporting.thumbnails import atlas, data_url, framed

if TYPE_CHECKING:
    import plotly.graph_objects as go

PICTURED = 3000  # points that have a picture that shows on hovering
TILE, LARGE = 32, 96  # its side in pixels, at most; of up to FEW of them
FEW = 500
NAME = 24  # letters of a name in the legend
FRAMED = 200  # pictures on the map, at most
RIGHT, WRONG, PALE = "#b9c2cf", "#d5321d", "#dfe3ea"


def palette(n: int) -> list[str]:
    """``n`` colours that can be told apart, as far as that goes."""
    import colorsys

    named = [
        "#3366cc",
        "#e67300",
        "#109618",
        "#c2185b",
        "#7b3fb5",
        "#0097a7",
        "#b8860b",
        "#d50000",
        "#5d4037",
        "#607d8b",
    ]
    if n <= len(named):
        return named[:n]
    turns = [(i * 0.618034) % 1 for i in range(n)]
    rgb = [colorsys.hls_to_rgb(t, 0.36 + 0.16 * (i % 3), 0.62) for i, t in enumerate(turns)]
    return ["#" + "".join(f"{round(255 * c):02x}" for c in one) for one in rgb]


def figure(data: DataModule, known: EmbeddingMap) -> go.Figure:
    """The map as a plotly figure: a set of WebGL traces for each colouring, one of them shown at a time."""
    import plotly.graph_objects as go

    size = 10 if len(known.rows) < 800 else 6 if len(known.rows) < 8000 else 3
    made = go.Figure()
    groups: list[tuple[str, int]] = []  # colouring and its number of traces
    for one in colourings(data, known):
        before = len(made.data)
        for value, (name, colour) in enumerate(zip(one.names, one.colours, strict=True)):
            inside = np.flatnonzero(one.values == value)
            if len(inside):
                marker = {"color": colour}
                made.add_trace(cloud(known, inside, size, shortened(name), marker, len(one.names) <= 40))
        groups.append((one.title, len(made.data) - before))
    if known.loss is not None:
        bar = {
            "color": known.loss,
            "colorscale": "Viridis",
            "showscale": True,
            "colorbar": {"title": "loss", "len": 0.6},
        }
        made.add_trace(cloud(known, np.arange(len(known.rows)), size, "loss", bar, False))
        groups.append(("loss of kNN", 1))
    shown = [i for i, (_, n) in enumerate(groups) for _ in range(n)]
    made.for_each_trace(lambda trace: trace.update(visible=False))
    made.update_traces(visible=True, selector=lambda t: shown[made.data.index(t)] == 0)
    buttons = [
        {"label": f"colour: {title}", "method": "update", "args": [{"visible": [g == i for g in shown]}]}
        for i, (title, _) in enumerate(groups)
    ]
    images = pictures(data, known)
    made.update_layout(images=images)
    on_off = [
        {"label": label, "method": "relayout", "args": [{f"images[{i}].visible": on for i in range(len(images))}]}
        for label, on in (("pictures on", True), ("pictures off", False))
    ]
    menu = {"direction": "down", "y": 1.0, "yanchor": "bottom", "xanchor": "left", "pad": {"b": 6}, "bgcolor": "#fff"}
    beside = {**menu, "pad": {"b": 6, "l": 200}}  # in pixels, so that they never lie on one another
    made.update_layout(updatemenus=[{**menu, "x": 0, "buttons": buttons}, {**beside, "x": 0, "buttons": on_off}])
    made.update_xaxes(visible=False)
    made.update_yaxes(visible=False, scaleanchor="x")
    made.update_layout(legend={"itemsizing": "constant", "font": {"size": 12}}, dragmode="pan", hovermode="closest")
    return made


@dataclass(frozen=True)
class Colouring:
    """A way to colour the points: the value ``[n]`` of each, and name and colour of each value."""

    title: str
    values: np.ndarray
    names: list[str]
    colours: list[str]


def colourings(data: DataModule, known: EmbeddingMap) -> list[Colouring]:
    """By class, prediction and mistake where there are labels, and by cluster."""
    clusters = int(known.clusters.max()) + 1
    by_cluster = Colouring("cluster", known.clusters, [f"cluster {i + 1}" for i in range(clusters)], palette(clusters))
    if known.labels is None or known.predictions is None:
        return [by_cluster]
    classes = int(max(known.labels.max(), known.predictions.max())) + 1
    names, colours = [class_name(data.data, i) for i in range(classes)], palette(classes)
    unknown = known.labels < 0
    further, grey = ([NO_LABEL], [PALE]) if unknown.any() else ([], [])
    mistakes = np.where(unknown, 2, known.wrong)
    return [
        Colouring("class", np.where(unknown, classes, known.labels), names + further, colours + grey),
        Colouring("kNN prediction", known.predictions, names, colours),
        Colouring("right or wrong", mistakes, ["right", "wrong", *further], [RIGHT, WRONG, *grey]),
        by_cluster,
    ]


def shortened(name: str) -> str:
    """A long name would take the legend's room from the map."""
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def cloud(known: EmbeddingMap, inside: np.ndarray, size: int, name: str, marker: dict, legend: bool) -> go.Scattergl:
    import plotly.graph_objects as go

    flat = known.flat[inside].astype(np.float32)
    return go.Scattergl(
        x=flat[:, 0], y=flat[:, 1], mode="markers", name=name, customdata=inside.astype(np.int32), hoverinfo="none",
        marker={"size": size, "opacity": 0.8, **marker}, showlegend=legend,
    )  # fmt: skip


def pictures(data: DataModule, known: EmbeddingMap) -> list[dict[str, object]]:
    """Images laid on the map, framed in their colours, as many as fit without hiding one another."""
    flat = known.flat[:PICTURED]
    side = 0.9 * float((flat.max(0) - flat.min(0)).max() or 1.0) / np.clip(1.6 * np.sqrt(len(flat)), 12, 28)
    placed: list[int] = []
    for i, place in enumerate(flat):
        if len(placed) < FRAMED and (not placed or float(np.abs(flat[placed] - place).max(1).min()) > side):
            placed.append(i)
    shades = colourings(data, known)[0]
    tile = LARGE if len(known.rows) <= FEW else TILE
    width = tile // 10  # of the frame

    def source(i: int) -> str:
        image = known.images.read(int(known.indices[i]))
        return data_url(framed(image, tile + 2 * width, shades.colours[int(shades.values[i])], width))

    return [
        {
            "source": source(i),
            "x": float(known.flat[i, 0]), "y": float(known.flat[i, 1]), "xref": "x", "yref": "y",
            "sizex": side, "sizey": side, "xanchor": "center", "yanchor": "middle", "layer": "above",
        }
        for i in placed
    ]  # fmt: skip


def hover_card(data: DataModule, known: EmbeddingMap, figure_id: str) -> str:
    """A card that shows the image under the pointer, and what is known of it."""
    n = min(PICTURED, len(known.rows))
    shown = [known.images.read(int(i)) for i in known.indices[:n]]
    tile = min(LARGE if n <= FEW else TILE, max(max(image.shape[:2]) for image in shown))
    sheet, columns = atlas(shown, tile)
    names = [class_name(data.data, i) for i in range(data.data.num_classes)]
    about = {
        "tile": tile, "columns": columns, "pictured": n, "names": names,
        "label": None if known.labels is None else known.labels.tolist(),
        "prediction": None if known.predictions is None else known.predictions.tolist(),
        "file": [known.images.name(int(i)) for i in known.indices[:n]],
        "index": known.indices.tolist(),
    }  # fmt: skip
    # A name of a file or a class may hold anything, "</script>" included.
    told = json.dumps(about).replace("<", "\\u003c")
    return (
        f"<style>#card-picture {{ background-image: url({sheet}); }}</style>"
        "<div id='card' hidden><div id='card-picture'></div><div id='card-text'></div></div>"
        f"<script>(() => {{ const about = {told};\nconst map = document.getElementById('{figure_id}');"
        f"{HOVER} }})()</script>"
    )


# plotly shows no images on hovering; this puts one into a card beside the pointer.
HOVER = """
const card = document.getElementById('card'), picture = document.getElementById('card-picture');
const zoom = 96 / about.tile;
map.on('plotly_hover', event => {
  const i = event.points[0].customdata, file = about.file[i] ?? String(about.index[i]);
  const lines = [/^\\d+$/.test(file) ? 'image ' + file : file];
  if (about.label) {
    const name = about.names[about.label[i]];
    lines.push(name === undefined ? 'no label' : 'class ' + name);
    if (about.prediction[i] !== about.label[i]) lines.push('taken for ' + about.names[about.prediction[i]]);
  }
  document.getElementById('card-text').textContent = lines.join('\\n');
  picture.hidden = i >= about.pictured;
  picture.style.backgroundSize = (about.columns * 96) + 'px auto';
  picture.style.backgroundPosition = `-${(i % about.columns) * 96}px -${Math.floor(i / about.columns) * 96}px`;
  card.hidden = false;
  const x = event.event.clientX, y = event.event.clientY;
  card.style.left = Math.min(x + 16, window.innerWidth - card.offsetWidth - 8) + 'px';
  card.style.top = Math.min(y + 16, window.innerHeight - card.offsetHeight - 8) + 'px';
});
map.on('plotly_unhover', () => { card.hidden = true; });
"""
