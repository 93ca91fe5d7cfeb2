"""SwAV's prototypes, by the images nearest to them."""

from __future__ import annotations

from collections.abc import Sequence

from selfsight.contracts import Batch
from selfsight.methods.swav import SwAV
from selfsight.reporting.galleries.gallery import Gallery, galleries

NOTE = "A row for each of the prototypes nearest to most images, with the images closest to it and their cosine."


@galleries.register
def prototypes(method: SwAV, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """The prototypes that are nearest to most images."""
    x = batch.views[0]
    method.prototypes.normalise()  # the last update of the optimiser has left them beside the sphere
    scores = method.prototypes(method.embed(method.backbone(x)))  # [B, K]
    used = scores.argmax(1).bincount(minlength=scores.shape[1]).topk(min(8, scores.shape[1])).indices
    nearest = scores[:, used].topk(min(8, len(x)), dim=0).indices.T  # [8, 8]
    captions = [[f"{scores[i, k]:.2f}" for i in row] for k, row in zip(used, nearest, strict=True)]
    return [Gallery("Prototypes", NOTE, x[nearest], captions)]
