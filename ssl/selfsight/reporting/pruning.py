"""The page of `selfsight prune`: which images go and which stay, the most and the least typical of both."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.datamodules import ImageData, ImageSet
from selfsight.engine.about_data import class_name
from selfsight.evaluation.pruning import Prototypes, evenness
from selfsight.reporting.page import figure_html, html_table, page
from selfsight.reporting.pictures import captioned
from selfsight.reporting.thumbnails import about_pictures

SHOWN = 24  # images of each kind
SHOWN_CLASSES = 50  # rows of the table, those that lose the largest share first
SHOWN_PROTOTYPES, OF_EACH = 16, 4  # prototypes, the largest ones, and the most and least typical images of each


@dataclass(frozen=True)
class Pruned:
    """Images that were scored, and which of them are kept.

    Attributes:
        images: the set they are from. indices: ``[N]``, their positions in it.
        labels: ``[N]``, -1 for none; None where no image has one.
        prototypes: of these images, see `prototype_scores`. kept: ``[N]`` bool.
    """

    images: ImageSet
    indices: Tensor
    labels: Tensor | None
    prototypes: Prototypes
    kept: Tensor

    def counts(self, classes: int) -> tuple[Tensor, Tensor]:
        """``[C]``, images of each class, and those of them that are kept; zeros without labels."""
        labels = torch.full_like(self.indices, -1) if self.labels is None else self.labels
        known = labels >= 0
        before, after = (torch.bincount(labels[rows], minlength=classes) for rows in (known, known & self.kept))
        return before, after

    def evenness(self, classes: int) -> tuple[float, float]:
        """Of the classes that have images: before, and of what is kept (see `pruning.evenness`); 1 of a single one."""
        before, after = self.counts(classes)
        there = before > 0
        return (evenness(before[there]), evenness(after[there])) if int(there.sum()) > 1 else (1.0, 1.0)

    def typical(self, rows: Tensor) -> list[int]:
        """Some rows (``[N]`` bool), the nearest to its prototype first."""
        chosen = rows.nonzero()[:, 0]
        order: list[int] = chosen[self.prototypes.score[chosen].argsort(stable=True)].tolist()
        return order


def pruning_page(data: ImageData, pruned: Pruned, about: str) -> str:
    """The whole page; ``about`` is a line on how it was chosen."""
    kept, total = int(pruned.kept.sum()), len(pruned.kept)
    goes, stays = pruned.typical(~pruned.kept), pruned.typical(pruned.kept)
    parts = [
        f"<h1>{kept:,} of {total:,} images of {html.escape(data.name)} kept</h1>",
        f"<p class='soft'>{html.escape(about)}. An image is typical where it is near its prototype, the centre of its "
        f"cluster among the features, and hard where it is far. {about_pictures(data.bands)}</p>",
        histogram(pruned),
        *(
            section(data, pruned, title, rows)
            for title, rows in (
                ("What goes: the most typical", goes[:SHOWN]),
                ("What goes: the least typical", goes[::-1][:SHOWN]),
                ("What stays: the most typical", stays[:SHOWN]),
                ("What stays: the least typical", stays[::-1][:SHOWN]),
            )
        ),
        by_prototype(data, pruned),
        by_class(data, pruned),
    ]
    return page(f"{data.name}: what is kept", parts)


def histogram(pruned: Pruned) -> str:
    """How many images are how far from their prototype, those that stay on those that go."""
    import plotly.graph_objects as go

    score = pruned.prototypes.score
    bars = [
        go.Histogram(x=score[rows].double().numpy(), name=name, nbinsx=50)
        for name, rows in (("stays", pruned.kept), ("goes", ~pruned.kept))
    ]
    figure = go.Figure(bars)
    figure.update_layout(barmode="stack", xaxis_title="one minus the cosine with the prototype", yaxis_title="images")
    return figure_html(figure)


def section(data: ImageData, pruned: Pruned, title: str, rows: Iterable[int]) -> str:
    """A heading and images; nothing where there are none."""
    shown = "".join(_image(data, pruned, row, "") for row in rows)
    return f"<h2>{title}</h2><div class='row'>{shown}</div>" if shown else ""


def by_prototype(data: ImageData, pruned: Pruned) -> str:
    """The most and the least typical images of the largest clusters; those that go in a red frame."""
    assignment, count = pruned.prototypes.assignment, len(pruned.prototypes.centroids)
    rows = []
    for cluster in torch.bincount(assignment, minlength=count).argsort(descending=True, stable=True)[:SHOWN_PROTOTYPES]:
        order = pruned.typical(assignment == cluster)
        ends = [order[:OF_EACH], order[OF_EACH:][-OF_EACH:]]
        cells = ["".join(_image(data, pruned, i, "" if pruned.kept[i] else "wrong") for i in end) for end in ends]
        if order:
            rows.append(f"<div class='row'>{'<figure>…</figure>'.join(cell for cell in cells if cell)}</div>")
    told = (
        f"The {OF_EACH} most and the {OF_EACH} least typical images of the largest clusters. Those in a red frame go."
    )
    return f"<h2>By prototype</h2><p class='soft'>{told}</p><div class='columns'>{''.join(rows)}</div>"


def by_class(data: ImageData, pruned: Pruned) -> str:
    """How many images of each class are kept; nothing without classes."""
    before, after = pruned.counts(data.num_classes)
    if not before.any():
        return ""
    share = after / before.clamp(min=1)
    order = [c for c in share.argsort(stable=True).tolist() if before[c]][:SHOWN_CLASSES]
    rows = [[class_name(data, c), f"{before[c]:,}", f"{after[c]:,}", f"{float(share[c]):.0%}"] for c in order]
    more = f" The {SHOWN_CLASSES} classes that lose most." if len(order) < data.num_classes else ""
    was, now = pruned.evenness(data.num_classes)
    told = f"Evenness of the classes (1: all of one size): {was:.2f} before, {now:.2f} of what is kept.{more}"
    return html_table("By class", ["class", "images", "kept", "share"], rows) + f"<p class='soft'>{told}</p>"


def _image(data: ImageData, pruned: Pruned, row: int, kind: str) -> str:
    label = -1 if pruned.labels is None else int(pruned.labels[row])
    caption = class_name(data, label) if label >= 0 else ""
    return captioned(pruned.images.read(int(pruned.indices[row])), caption, kind)
