"""Several networks as one: what each stage of multistage contrastive learning sees in an image, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selfsight.losses.mcl import concatenated


class Stages(nn.Module):
    """Features of all networks side by side, divided by the norm of the whole.

    Args:
        networks: timm's interface, of one width D.

    Attributes:
        num_features: D times their number. feature_info: of no map.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.num_features: int = sum(network.num_features for network in networks)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, num_features]``."""
        return concatenated(torch.stack([network(x) for network in self.networks]))
