"""Places that PixPro finds again in the other view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.losses.pixpro import pixel_distances
from selfsight.methods.pixpro import PixPro, unit
from selfsight.nn.boxes import corners
from selfsight.reporting.galleries.gallery import Gallery, galleries

MARKED = 5  # places of an image that are shown


@galleries.register
def correspondences(method: PixPro, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """A row of three for each image: marked places in one view, where they lie in the other, where they are found."""
    if batch.boxes is None or len(batch.views) < 3:
        return []
    views = [view[:6] for view in batch.views[1:3]]
    f = [method.dense(view) for view in views]
    x = method.projector(f[0])
    q = unit(method.propagation(x) if method.loss == "pixpro" else x).flatten(2).transpose(1, 2)  # [B, hw, C]
    k = method.target(views)[1][1].flatten(2)  # [B, C, hw]
    size = method.map_size(f)
    c1, c2 = (corners(boxes[:6]) for boxes in batch.boxes[1:3])
    distances = pixel_distances(c1, c2, size)[0]  # [B, hw, hw]
    # the pixels of the first view that the second one shows best, as the crops lie
    shown = distances.amin(2).topk(min(MARKED, distances.shape[1]), largest=False).indices.sort(1).values  # [B, n]
    truth, found = (m.argmax(2).gather(1, shown) for m in (-distances, q @ k))  # [B, n]
    points = torch.stack([centres(index, size) for index in (shown, truth, found)], dim=1)  # [B, 3, n, 2]
    note = (
        "Places in one view, where they lie in the other, and where the network finds what is most like them; the "
        f"maps it compares have {size[0]} x {size[1]} pixels."
    )
    captions = [["first view", "second: true", "second: found"]] * len(shown)
    return [Gallery("Correspondences", note, torch.stack([*views, views[1]], dim=1), captions, points=points)]


def centres(index: Tensor, size: tuple[int, int]) -> Tensor:
    """``[..., 2]``: centre (x, y) of the pixels ``index`` of a map of ``size``, as shares of its sides."""
    return torch.stack([(index % size[1] + 0.5) / size[1], (index // size[1] + 0.5) / size[0]], dim=-1)
