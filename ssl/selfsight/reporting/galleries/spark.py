"""What SparK makes of hidden cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.losses.spark import fill_hidden
from selfsight.methods.spark import SparK
from selfsight.reporting.galleries.gallery import Gallery, galleries


@galleries.register
def reconstructions(method: SparK, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """A row of three for each image."""
    note = "Image, what the encoder sees of it, and what the decoder makes of the hidden cells"
    note += ", each given its true mean and contrast." if method.normalise_pixels else "."
    return [Gallery("Reconstructions", note, panels(method, batch.views[0][:8]))]


def panels(method: SparK, x: Tensor, active: Tensor | None = None) -> Tensor:
    """Input, masked input and reconstruction ``[B, 3, 3, H, W]`` (image, panel, channel, ...), all normalised."""
    result = method.reconstruct(x, active)
    visible = result.mask.at(x.shape[2], x.shape[3], x.dtype)
    filled = fill_hidden(result.image.to(x.dtype), x, result.mask.active, normalised=method.normalise_pixels)
    return torch.stack([x, x * visible, filled], dim=1)
