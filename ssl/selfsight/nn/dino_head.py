"""DINO's projection head (facebookresearch/dino, vision_transformer.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.heads import mlp
from selfsight.nn.precision import float32, full_precision


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose row k is ``g_k v_k / |v_k|``; a layer in float32, as its outputs meet a small
    temperature.

    PyTorch's own weight normalisation of that name cannot be copied, or keeps other names than published weights have.

    Attributes:
        weight_v: ``[K, D]``. weight_g: ``[K, 1]``, starting at 1.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, out_dim, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """Linear layers with GELU between - unit length - weight-normalised linear layer to K dimensions.

    Weights start normal with std 0.02 (the last layer: PyTorch's rule), biases at 0.

    Args:
        dim: of the feature. out_dim: K.
        layers, hidden_dim, bottleneck_dim: of the part before unit length; one layer is a single linear one.
        norm: BatchNorm before each GELU.
        norm_last_layer: the rows of the last layer stay unit vectors, so that scores are cosines; False learns their
            lengths.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1 or out_dim < 2:
            raise UserError(
                f"DINO's head was given {layers} layers and {out_dim} dimensions; it needs at least 1 and 2 "
                "(the paper: 3 and 65536)."
            )
        widths = [dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        self.mlp = mlp(widths, norm=nn.BatchNorm1d if norm else None, activation=nn.GELU, of_features=True)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, h: Tensor) -> Tensor:
        """``[B, dim]`` to scores ``[B, K]``."""
        return self.last_layer(F.normalize(float32(self.mlp(h)), dim=1))
