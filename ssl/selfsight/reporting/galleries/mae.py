"""What MAE makes of hidden patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.losses.mae import filled
from selfsight.methods.mae import MAE
from selfsight.reporting.galleries.gallery import Gallery, galleries


@galleries.register
def reconstructions(method: MAE, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """A row of three for each image, with the same hidden patches every time."""
    x = batch.views[0][:8]
    noise = torch.rand(len(x), method.length, generator=torch.Generator().manual_seed(0)).to(x)
    note = "Image, what the encoder sees of it, and what the decoder makes of the hidden patches"
    note += ", each given its true mean and contrast." if method.normalise_pixels else "."
    return [Gallery("Reconstructions", note, panels(method, x, noise))]


def panels(method: MAE, x: Tensor, noise: Tensor) -> Tensor:
    """Image, what the encoder sees, and the reconstruction: ``[B, 3, C, H, W]``, all normalised."""
    result = method.reconstruct(x, noise)
    mask = result.patches.mask
    blank = filled(torch.zeros_like(result.prediction), x, mask, normalised=False)
    return torch.stack([x, blank, filled(result.prediction, x, mask, normalised=method.normalise_pixels)], dim=1)
