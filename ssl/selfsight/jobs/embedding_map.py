"""The map of an embedding: features flattened to a plane, with what is known of each image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from selfsight.errors import UserError, nearest
from selfsight.jobs.build import library
from selfsight.jobs.measure import class_name
from selfsight.jobs.thumbnails import atlas, data_url, framed

PROJECTIONS = ("tsne", "umap", "pca")
MAPPED = 100_000  # points at most
FITTED = 1500  # of them t-SNE is computed for; the others are placed between their neighbours among these
PICTURED = 3000  # of them have a picture that shows on hovering
TILE, LARGE = 32, 96  # its side in pixels, at most; of up to FEW of them
FEW = 500
NAME = 24  # letters of a name in the legend
FRAMED = 200  # pictures on the map, at most
VOTERS, TEMPERATURE = 20, 0.07  # of the kNN that predicts


@dataclass(frozen=True)
class Facts:
    """What is known of each mapped image.

    Attributes:
        rows: ``[n]``, which rows of the test features. flat: ``[n, 2]``, their places.
        labels, predictions, clusters: ``[n]``; None where images have no labels.
        loss: ``[n]``, minus the logarithm of the share of its neighbours' votes that the true class has.
    """

    rows: np.ndarray
    flat: np.ndarray
    clusters: np.ndarray
    labels: np.ndarray | None = None
    predictions: np.ndarray | None = None
    loss: np.ndarray | None = None


def facts(train: Any, test: Any, projection: str = "tsne", most: int = MAPPED) -> Facts:
    """Places, classes, clusters, predictions and losses of (at most ``most``) test images, in a shuffled order."""
    rows = np.random.default_rng(0).permutation(len(test))[:most]
    x = F.normalize(test.x[rows], dim=1)
    flat = flatten(x.numpy(), projection)
    classes = 0 if train.labels is None else train.classes
    k = min(classes or 10, max(1, len(x) // 4))
    clusters = library("evaluation.clustering").kmeans(x, x, k, 20, 1, 0)[1]
    if train.labels is None or test.labels is None:
        return Facts(rows, flat, clusters)
    predictions, loss = votes(train, test.take(torch.from_numpy(rows)), itself=train is test)
    return Facts(rows, flat, clusters, test.labels[rows].numpy(), predictions.numpy(), loss.numpy())


def flatten(x: np.ndarray, projection: str) -> np.ndarray:
    """``[N, D]`` to ``[N, 2]``.

    Raises:
        UserError: an unknown projection, or one whose package is missing.
    """
    from sklearn.decomposition import PCA

    if projection not in PROJECTIONS:
        raise UserError(
            f"projection is '{projection}'; one of {', '.join(PROJECTIONS)} was expected."
            f"{nearest(projection, PROJECTIONS)}"
        )
    if projection == "pca" or len(x) < 5:
        return PCA(2, random_state=0).fit_transform(x) if min(x.shape) >= 2 else np.pad(x, ((0, 0), (0, 1)))[:, :2]
    if projection == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise UserError("projection=umap needs a package: pip install 'selfsight[umap]'.") from None
        return lying(UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=0).fit_transform(x))
    from sklearn.manifold import TSNE

    some = x[:FITTED]
    perplexity = min(30.0, max(2.0, (len(some) - 1) / 4))
    flat = lying(TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(some))
    if len(x) == len(some):
        return flat
    similarity, index = library("evaluation.knn").neighbours(torch.from_numpy(x[FITTED:]), torch.from_numpy(some), 5)
    weight = (similarity / 0.05).softmax(1)[:, :, None]
    placed = (weight * torch.from_numpy(flat)[index]).sum(1)
    return np.concatenate([flat, placed.numpy()])


def lying(flat: np.ndarray) -> np.ndarray:
    """Places ``[N, 2]`` turned so that the longer side lies across, as screens do; distances stay."""
    from sklearn.decomposition import PCA

    turned: np.ndarray = PCA(2, random_state=0).fit_transform(flat)
    return turned


def votes(train: Any, test: Any, itself: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ``[N]`` that the weighted nearest training images vote for, and the log loss of the true class ``[N]``.

    With ``itself`` the images are among the training images, and their nearest one, themselves, has no vote.
    """
    bank, queries = F.normalize(train.x, dim=1), F.normalize(test.x, dim=1)
    similarity, index = library("evaluation.knn").neighbours(queries, bank, min(VOTERS + itself, len(bank)))
    similarity, index = similarity[:, int(itself) :], index[:, int(itself) :]
    classes = max(train.classes, test.classes)
    answers, losses = [], []
    for s, i, y in zip(similarity.split(4096), index.split(4096), test.labels.split(4096), strict=True):
        p = torch.zeros(len(s), classes + 1)  # the last column takes voters without a label
        p.scatter_add_(1, train.labels[i] % (classes + 1), (s / TEMPERATURE).softmax(1))
        answers.append(p[:, :classes].argmax(1))
        losses.append(-p.gather(1, (y % (classes + 1))[:, None])[:, 0].clamp(min=1e-3).log())
    return torch.cat(answers), torch.cat(losses)


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


def figure(data: Any, test: Any, known: Facts) -> Any:
    """The map as a plotly figure: a set of WebGL traces for each colouring, one of them shown at a time."""
    import plotly.graph_objects as go

    size = 10 if len(known.rows) < 800 else 6 if len(known.rows) < 8000 else 3
    made = go.Figure()
    groups: list[tuple[str, int]] = []  # colouring and its number of traces
    for title, values, names in colourings(data, known):
        colours = palette(len(names))
        if title == "right or wrong":
            colours = ["#b9c2cf", "#d5321d"]
        before = len(made.data)
        for value, (name, colour) in enumerate(zip(names, colours, strict=True)):
            inside = np.flatnonzero(values == value)
            if len(inside):
                made.add_trace(cloud(go, known, inside, size, shortened(name), {"color": colour}, len(names) <= 40))
        groups.append((title, len(made.data) - before))
    if known.loss is not None:
        bar = {
            "color": known.loss,
            "colorscale": "Viridis",
            "showscale": True,
            "colorbar": {"title": "loss", "len": 0.6},
        }
        made.add_trace(cloud(go, known, np.arange(len(known.rows)), size, "loss", bar, False))
        groups.append(("loss of kNN", 1))
    shown = [i for i, (_, n) in enumerate(groups) for _ in range(n)]
    made.for_each_trace(lambda trace: trace.update(visible=False))
    made.update_traces(visible=True, selector=lambda t: shown[made.data.index(t)] == 0)
    buttons = [
        {"label": f"colour: {title}", "method": "update", "args": [{"visible": [g == i for g in shown]}]}
        for i, (title, _) in enumerate(groups)
    ]
    images = pictures(data, test, known)
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


def colourings(data: Any, known: Facts) -> list[tuple[str, np.ndarray, list[str]]]:
    """Title, value of each point, name of each value."""
    found = []
    if known.labels is not None and known.predictions is not None:
        names = [
            class_name(data.data, i) for i in range(max(int(known.labels.max()), int(known.predictions.max())) + 1)
        ]
        found.append(("class", known.labels, names))
        found.append(("kNN prediction", known.predictions, names))
        found.append(("right or wrong", (known.labels != known.predictions).astype(int), ["right", "wrong"]))
    found.append(("cluster", known.clusters, [f"cluster {i + 1}" for i in range(int(known.clusters.max()) + 1)]))
    return found


def shortened(name: str) -> str:
    """A long name would take the legend's room from the map."""
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def cloud(go: Any, known: Facts, inside: np.ndarray, size: int, name: str, marker: dict, legend: bool) -> Any:
    flat = known.flat[inside].astype(np.float32)
    return go.Scattergl(
        x=flat[:, 0], y=flat[:, 1], mode="markers", name=name, customdata=inside.astype(np.int32), hoverinfo="none",
        marker={"size": size, "opacity": 0.8, **marker}, showlegend=legend,
    )  # fmt: skip


def pictures(data: Any, test: Any, known: Facts) -> list[dict[str, Any]]:
    """Images laid on the map, framed in their colours, as many as fit without hiding one another."""
    flat = known.flat[:PICTURED]
    side = 0.9 * float((flat.max(0) - flat.min(0)).max() or 1.0) / np.clip(1.6 * np.sqrt(len(flat)), 12, 28)
    placed: list[int] = []
    for i, place in enumerate(flat):
        if len(placed) < FRAMED and (not placed or float(np.abs(flat[placed] - place).max(1).min()) > side):
            placed.append(i)
    values = known.labels if known.labels is not None else known.clusters
    colours = palette(int(values.max()) + 1)
    images = data.data.split("test")
    tile = LARGE if len(known.rows) <= FEW else TILE
    width = tile // 10  # of the frame

    def source(i: int) -> str:
        image = images.read(int(test.indices[known.rows[i]]))
        return data_url(framed(image, tile + 2 * width, colours[int(values[i])], width))

    return [
        {
            "source": source(i),
            "x": float(known.flat[i, 0]), "y": float(known.flat[i, 1]), "xref": "x", "yref": "y",
            "sizex": side, "sizey": side, "xanchor": "center", "yanchor": "middle", "layer": "above",
        }
        for i in placed
    ]  # fmt: skip


def hover_card(data: Any, test: Any, known: Facts, figure_id: str) -> str:
    """A card that shows the image under the pointer, and what is known of it."""
    images = data.data.split("test")
    indices = test.indices[known.rows]
    n = min(PICTURED, len(known.rows))
    shown = [images.read(int(i)) for i in indices[:n]]
    tile = min(LARGE if n <= FEW else TILE, max(max(image.shape[:2]) for image in shown))
    sheet, columns = atlas(shown, tile)
    names = [class_name(data.data, i) for i in range(data.data.num_classes)]
    about = {
        "tile": tile, "columns": columns, "pictured": n, "names": names,
        "label": None if known.labels is None else known.labels.tolist(),
        "prediction": None if known.predictions is None else known.predictions.tolist(),
        "file": [images.name(int(i)) for i in indices[:n]],
        "index": indices.tolist(),
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
