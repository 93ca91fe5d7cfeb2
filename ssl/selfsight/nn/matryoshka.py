"""Embeddings that can be cut: layers for every prefix (Kusupati et al. 2022, arXiv 2205.13147; RAIVNLab/MRL)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError


def nested_widths(smallest: int, largest: int) -> list[int]:
    """Powers of two from ``2^smallest`` to ``2^largest``: 8, 16, …, 2048 for 3 and 11, the paper's list."""
    return [2**i for i in range(smallest, largest + 1)]


def checked_widths(widths: Sequence[int], features: int) -> list[int]:
    """Ascending widths of prefixes of ``features`` numbers.

    Raises:
        UserError: none, one twice or below 1, or one above the width of the features, which slicing would cut silently.
    """
    ascending = sorted(widths)
    if not ascending or ascending[0] < 1 or len(set(ascending)) < len(ascending) or ascending[-1] > features:
        raise UserError(
            f"The nested dimensions are {list(widths)}, of embeddings of {features} numbers; give different whole "
            f"numbers from 1 to {features}."
        )
    return ascending


def all_widths(dims: Sequence[int] | None, features: int) -> list[int]:
    """``dims``, or powers of two from 8 on where they are None, and after them ``features``, the whole width.

    Raises:
        UserError: see `checked_widths`; or they do not ascend.
    """
    widths = nested_widths(3, features.bit_length() - 1) if dims is None else list(dims)
    if widths != (ascending := sorted({*widths})):
        raise UserError(
            f"The nested dimensions are {widths}; different numbers that ascend were expected: {ascending}."
        )
    checked_widths(widths or [features], features)
    return widths if widths[-1:] == [features] else [*widths, features]


class PrefixLinear(nn.Linear):
    """A linear layer on features that takes their first m as well, for any m.

    They meet the first m columns of its weight and the whole bias (MRL-E), or weights of their own, where `own_weights`
    has given them some (MRL).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.prefixes = nn.ModuleDict()

    def own_weights(self, widths: Sequence[int]) -> None:
        """A layer of its own for the first m features, for every m of ``widths`` below all of them.

        It begins with the columns that would be shared, as large as those of a layer of m inputs are.
        """
        for m in checked_widths(widths, self.in_features):
            if m < self.in_features:
                layer = nn.Linear(m, self.out_features, bias=self.bias is not None).to(self.weight)
                with torch.no_grad():
                    layer.weight.copy_(self.weight[:, :m] * math.sqrt(self.in_features / m))
                    if self.bias is not None:
                        layer.bias.copy_(self.bias)
                self.prefixes[str(m)] = layer.requires_grad_(self.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        m = x.shape[-1]
        if m == self.in_features:
            return super().forward(x)
        if str(m) in self.prefixes:
            own: Tensor = self.prefixes[str(m)](x)
            return own
        return F.linear(x, self.weight[:, :m], self.bias)


class PrefixLayerNorm(nn.LayerNorm):
    """LayerNorm of features, or of their first m by themselves, with the first m scales and shifts."""

    def __init__(self, features: int) -> None:
        super().__init__(features)

    def forward(self, x: Tensor) -> Tensor:
        m = x.shape[-1]
        return F.layer_norm(x, (m,), self.weight[:m], self.bias[:m], self.eps)


def prefixes(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """``[B, m]`` for every m, as they are; what compares directions normalises each prefix by itself."""
    return [x[:, :m] for m in checked_widths(widths, x.shape[1])]


@torch.no_grad()
def cascade(logits: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Predictions by the shortest prefix that is sure enough.

    Args:
        logits: ``[L, N, C]``, the shortest prefix first. thresholds: L - 1 probabilities; a prefix decides where its
            highest one is above, and the last one decides where none is.

    Returns:
        level ``[N]`` that decided, and class ``[N]``.
    """
    confidence, label = logits.softmax(-1).max(-1)  # [L, N]
    sure = confidence[:-1] > torch.as_tensor(thresholds, dtype=confidence.dtype, device=confidence.device)[:, None]
    sure = torch.cat([sure, torch.ones_like(confidence[:1], dtype=torch.bool)])
    level = sure.int().argmax(0)
    return level, label.gather(0, level[None])[0]
