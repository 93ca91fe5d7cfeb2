"""Small masked-modelling models that the tests of SparK share."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from selfsight.methods.spark import SparK

SMALL: dict[str, Any] = {
    "mask_ratio": 0.6,
    "decoder_width": 32,
    "densify_norm": "auto",
    "levels": 4,
    "normalise_pixels": True,
    "decoder_precision": "auto",
    "engine": "auto",
    "sync_batchnorm": True,
}


def lively(net: nn.Module) -> nn.Module:
    """Zero-initialised norms and layer scales hide the branches they end: give every vector some noise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def spark(backbone: str | nn.Module, *, arguments: dict[str, Any] | None = None, **options: Any) -> SparK:
    torch.manual_seed(0)
    if isinstance(backbone, str):
        backbone = lively(timm.create_model(backbone, num_classes=0, **(arguments or {})))
    return SparK(backbone, **{**SMALL, **options})


def random_mask(b: int, grid: tuple[int, int], keep: int, seed: int = 0) -> Tensor:
    noise = torch.rand(b, grid[0] * grid[1], dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    kth = noise.kthvalue(keep, dim=1, keepdim=True).values
    return (noise <= kth).view(b, 1, *grid)


def images(b: int, h: int, w: int, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(b, channels, h, w, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
