"""Rows of images for the report: nearest neighbours, views with their crops, and what the method itself shows."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.datamodules import DataModule, ImageDataModule, ImageSet, SemiDataModule
from selfsight.engine.about_data import class_name
from selfsight.evaluation import Features
from selfsight.evaluation.views import plain_view
from selfsight.methods.base import Method
from selfsight.reporting.embedding import EmbeddingMap
from selfsight.reporting.embedding_map import palette
from selfsight.reporting.galleries import Gallery
from selfsight.reporting.galleries import galleries as galleries_of
from selfsight.reporting.thumbnails import data_url, denormalised, fitted, thumbnail

if TYPE_CHECKING:
    from PIL import Image

NEIGHBOURS = 8
VIEWED = 4  # images whose views are shown
STRIP = 96  # side in pixels of an image in `strips`
SHOWN = 128  # images a method makes its pictures from


def neighbours(
    data: DataModule, train: Features, shown: Features, known: EmbeddingMap, kind: str = "test", rows: int = 8
) -> str:
    """For some images, and for those the kNN gets most wrong, the training images closest to them by cosine.

    Args:
        train, shown, known: see `embedding.build_map`. kind: what those shown are called.
    """
    order = np.argsort(known.rows)
    if known.labels is not None:
        order = order[np.argsort(known.labels[order], kind="stable")]
    spread = order[np.linspace(0, len(order) - 1, min(rows, len(order))).astype(int)]
    others = "the others" if shown is train else "the training images"
    parts = ["<h2 id='neighbours'>Nearest neighbours</h2>"]
    parts.append(f"<p class='soft'>A {kind} image, then {others} closest to it.")
    parts.append(" A red frame marks a neighbour of another class.</p>" if known.labels is not None else "</p>")
    parts.append("<div class='columns'>")
    parts += [_with_neighbours(data, train, shown, known, int(i)) for i in spread]
    parts.append("</div>")
    worst = [] if known.loss is None else [int(i) for i in np.argsort(-known.loss) if known.wrong[i]][:rows]
    if worst:
        parts.append(
            f"<h3>The worst ones</h3><p class='soft'>{kind.capitalize()} images whose neighbours disagree most with "
            "their class: hard images, or wrong labels.</p><div class='columns'>"
        )
        parts += [_with_neighbours(data, train, shown, known, i) for i in worst]
        parts.append("</div>")
    return "".join(parts)


def _with_neighbours(data: DataModule, train: Features, shown: Features, known: EmbeddingMap, i: int) -> str:
    row = int(known.rows[i])
    similarity = F.normalize(shown.x[row], dim=0) @ F.normalize(train.x, dim=1).T
    if shown is train:
        similarity[row] = -torch.inf
    best = similarity.topk(min(NEIGHBOURS, len(train) - (shown is train))).indices.tolist()
    label = None if known.labels is None else int(known.labels[i])
    query = captioned(known.images.read(int(known.indices[i])), _class(data, label), "query")
    found = []
    for other in best:
        theirs = None if train.labels is None else int(train.labels[other])
        wrong = label is not None and theirs is not None and theirs != label and min(label, theirs) >= 0
        picture = data.data.split("train").read(int(train.indices[other]))
        found.append(captioned(picture, _class(data, theirs) if wrong else "", "wrong" if wrong else ""))
    return f"<div class='row'>{query}{''.join(found)}</div>"


def _class(data: DataModule, label: int | None) -> str:
    return "" if label is None else class_name(data.data, label)


def captioned(image: np.ndarray, caption: str, kind: str = "") -> str:
    """A small picture with a line below it; ``kind``: ``wrong`` (a red frame), ``query`` or ``large``, or several."""
    text = html.escape(caption)
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    source = thumbnail(image, 192) if "large" in kind else thumbnail(image)
    return f"<figure class='{kind}' title='{text}'><img alt='{text}' src='{source}'>{below}</figure>"


def viewed_batch(data: DataModule) -> tuple[Batch, ImageSet]:
    """Some of the images to learn from: un-augmented, then in the views of training, with boxes; and the images."""
    source = getattr(data, "unlabelled", data).data.everything()  # with the labels that a semi-supervised run hides
    rows = torch.linspace(0, len(source) - 1, min(SHOWN, len(source))).long()
    images = source.select(rows)
    plain = plain_view(data)
    module = ImageDataModule(
        replace(data.data, train=images, unlabelled=None),
        [plain, *data.views],
        batch_size=len(rows),
        num_workers=0,
        engine="auto",
        seed=0,
        device="cpu",
    )
    return next(iter(module.train_dataloader())), images


def normalisation(data: DataModule) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the views have been brought to; 0 and 1 where they are left as they are."""
    view = data.views[0]
    return ((0.0,) * 3, (1.0,) * 3) if view.mean is None or view.std is None else (view.mean, view.std)


def views(batch: Batch, images: ImageSet, data: DataModule) -> str:
    """Images with the boxes their views were cut from, and these views in the same colours."""
    if batch.boxes is None or len(batch.views) < 2:
        return ""
    colours = palette(len(batch.views) - 1)
    mean, std = normalisation(data)
    rows = []
    for i in range(min(VIEWED, len(batch))):
        image = images.read(int(batch.indices[i]))
        drawn = _boxed(image, [boxes[i] for boxes in batch.boxes[1:]], colours)
        cells = [f"<figure><img class='source' alt='image with boxes' src='{data_url(drawn)}'></figure>"]
        for view, colour in zip(batch.views[1:], colours, strict=True):
            picture = thumbnail(denormalised(view[i], mean, std, data.data.bands is None))
            cells.append(f"<figure><img alt='view' style='border-color:{colour}' src='{picture}'></figure>")
        rows.append(f"<div class='row views'>{''.join(cells)}</div>")
    about = "<p class='soft'>What the network learns from: each frame is where a view was cut.</p>"
    return f"<h2 id='views'>Views</h2>{about}<div class='columns'>{''.join(rows)}</div>"


def strips(batch: Batch, images: ImageSet, data: DataModule) -> list[np.ndarray]:
    """Images with their views beside them, ``[STRIP, W, 3]`` uint8 each; those of `viewed_batch`."""
    mean, std = normalisation(data)
    found = []
    for i in range(min(VIEWED, len(batch))):
        row = [images.read(int(batch.indices[i]))]
        row += [denormalised(view[i], mean, std, data.data.bands is None) for view in batch.views[1:]]
        cells = [fitted(image, STRIP) for image in row]
        found.append(np.concatenate([in_square(np.asarray(cell)) for cell in cells], axis=1))
    return found


def in_square(picture: np.ndarray, side: int = STRIP) -> np.ndarray:
    """A picture ``[h, w, 3]`` uint8 in the middle of a white square."""
    canvas = np.full((side, side, 3), 255, np.uint8)
    top, left = ((side - length) // 2 for length in picture.shape[:2])
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _boxed(image: np.ndarray, boxes: Sequence[Tensor], colours: Sequence[str], side: int = 192) -> Image.Image:
    """The image at ``side`` pixels with each box ``(top, left, height, width, H, W, ...)`` as a frame."""
    from PIL import ImageDraw

    picture = fitted(image, side)
    pen = ImageDraw.Draw(picture)
    for box, colour in zip(boxes, colours, strict=True):
        top, left, height, width, whole_height, whole_width = (float(v) for v in box[:6])
        down, right = picture.height / whole_height, picture.width / whole_width
        x = (max(0.0, left * right), min(picture.width, (left + width) * right) - 1)  # crops may go beyond the image
        y = (max(0.0, top * down), min(picture.height, (top + height) * down) - 1)
        pen.rectangle((x[0], y[0], x[1], y[1]), outline=colour, width=3)
    return picture


def _pointed(image: np.ndarray, points: Tensor, side: int = 192) -> np.ndarray:
    """The image at ``side`` pixels with a disc at each of ``points [n, 2]`` (x, y as shares of its sides).

    Each disc is smaller than the one before, so that of several in one place all are seen.
    """
    from PIL import ImageDraw

    picture = fitted(image, side)
    pen = ImageDraw.Draw(picture)
    for i, ((x, y), colour) in enumerate(zip(points.tolist(), palette(len(points)), strict=True)):
        radius = side * (0.08 - 0.06 * i / len(points))
        pen.circle((x * picture.width, y * picture.height), radius, fill=colour, outline="white", width=2)
    return np.asarray(picture)


def galleries(method: Method, batch: Batch, data: DataModule) -> str:
    """What the method shows of itself."""
    method.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = galleries_of(method, batch, data.data.classes)
    return "".join(_gallery(one, data) for one in found)


def _gallery(gallery: Gallery, data: DataModule) -> str:
    rows = []
    colour = data.data.bands is None
    for r, images in enumerate(denormalised(gallery.images, *normalisation(data), colour)):
        shown = list(images)
        if gallery.points is not None:
            shown = [_pointed(image, p) for image, p in zip(images, gallery.points[r], strict=True)]
        kinds = ["large" if gallery.points is not None else ""] * len(shown)
        if gallery.labelled is not None:
            kinds = ["query"] * len(shown) + [""] * gallery.labelled.shape[1]
            assert isinstance(data, SemiDataModule), "there are images with labels beside those without"
            shown += [data.few.train.read(int(i)) for i in gallery.labelled[r]]
        if gallery.right is not None:
            kinds = [kind if ok else f"{kind} wrong" for kind, ok in zip(kinds, gallery.right[r].tolist(), strict=True)]
        captions = gallery.captions[r] if gallery.captions else [""] * len(shown)
        cells = [captioned(image, c, kind) for image, c, kind in zip(shown, captions, kinds, strict=True)]
        rows.append(f"<div class='row'>{''.join(cells)}</div>")
    note = html.escape(gallery.note) + (" Mistakes have a red frame." if gallery.right is not None else "")
    return f"<h2>{html.escape(gallery.title)}</h2><p class='soft'>{note}</p><div class='columns'>{''.join(rows)}</div>"
