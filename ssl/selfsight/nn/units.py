"""From outputs of mean 0 and variance 1 to the units of what is predicted."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Units(nn.Module):
    """``y = x * std + mean``, column by column.

    Attributes:
        mean, std: ``[T]`` float32, buffers: they travel with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @classmethod
    def of(cls, values: Tensor) -> Units:
        """Those of ``values [N, T]``, NaN left out; a column of one value, or of none, keeps its unit."""
        known = ~values.isnan()
        count = known.sum(dim=0).clamp(min=1)
        mean = values.nan_to_num().double().sum(dim=0) / count
        centred = (values.double() - mean).where(known, 0.0)
        std = (centred.square().sum(dim=0) / count).sqrt()
        return cls(mean.float(), std.where(std > 0, torch.ones_like(std)).float())

    def standardised(self, y: Tensor) -> Tensor:
        """The other way round."""
        return (y - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T]``."""
        return x * self.std + self.mean
