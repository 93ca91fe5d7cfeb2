"""Where the teacher's class token looks, for transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.methods.dino import DINO
from selfsight.nn.vit import class_attention, is_vit, last_attention, mass_mask
from selfsight.reporting.galleries.gallery import Gallery, galleries

#: share of the attention that the marked patches hold
MASS = 0.6


@galleries.register
def attention_maps(method: DINO, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """A row for each image: itself, and the patches where each head of the last block looks most."""
    backbone = method.teacher.module["backbone"]  # type: ignore[index]
    if not is_vit(backbone):
        return []
    x = batch.views[0][:6]
    maps = attention(backbone, x)[:, :5]  # [B, heads, h, w]
    masks = mass_mask(maps, MASS)
    size = (x.shape[-2], x.shape[-1])
    kept = F.interpolate(masks.to(x.dtype), size=size, mode="nearest")[:, :, None]  # [B, heads, 1, H, W]
    dimmed = x[:, None] * (0.15 + 0.85 * kept)
    note = f"Each image, and in it the patches that hold {MASS:.0%} of the attention of a head in the last block."
    captions = [["image", *(f"head {i + 1}" for i in range(maps.shape[1]))]] * len(x)
    return [Gallery("Attention", note, torch.cat([x[:, None], dimmed], dim=1), captions)]


def attention(backbone: torch.nn.Module, x: Tensor) -> Tensor:
    """Attention of the class token of the last block for the patches, ``[B, heads, h, w]``."""
    patch = backbone.patch_embed.patch_size[0]  # type: ignore[union-attr, index]
    grid = x.shape[-2] // patch, x.shape[-1] // patch
    return class_attention(last_attention(backbone, x), backbone.num_prefix_tokens, grid)  # type: ignore[arg-type]
