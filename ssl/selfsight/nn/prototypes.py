"""Prototypes: directions that embeddings are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.nn.precision import full_precision


class Prototypes(nn.Linear):
    """``C [K, D]``; ``forward(z)`` gives the scores ``z C^T``: cosines, once `normalise` has been called.

    Rows leave the sphere with every step of the optimiser; `normalise` puts them back without touching the gradient
    (SwAV, main_swav.py, does so before each forward). Scores are float32 under autocast: divided by a small
    temperature, half precision would decide over the nearest prototype.
    """

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__(dim, prototypes, bias=False)

    @torch.no_grad()
    def normalise(self) -> None:
        """``c_k <- c_k / max(|c_k|, 1e-12)``, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    @full_precision
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z)
