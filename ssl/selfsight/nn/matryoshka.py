"""Embeddings that can be cut: a classifier for every prefix (Kusupati et al. 2022, arXiv 2205.13147; RAIVNLab/MRL)."""

from __future__ import annotations

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


class MatryoshkaLinear(nn.Module):
    """A linear classifier for each of the first ``m`` features, for every m of ``widths``.

    Each has weights of its own (MRL); with ``efficient`` all share one, of which the m-th uses the first m columns and
    the whole bias (MRL-E: less memory, weaker at the smallest prefixes). Features beyond the largest m are not used.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        efficient: bool = False,
        bias: bool = True,
        features: int | None = None,
    ) -> None:
        super().__init__()
        self.widths = checked_widths(widths, features or max(widths, default=0))
        own = self.widths[-1:] if efficient else self.widths
        self.heads = nn.ModuleList(nn.Linear(m, num_classes, bias=bias) for m in own)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, D]`` to logits ``[B, C]`` of every prefix, the shortest first."""
        if len(self.heads) == len(self.widths):
            return [head(x[:, :m]) for m, head in zip(self.widths, self.heads, strict=True)]
        shared = self.heads[0]
        assert isinstance(shared, nn.Linear)
        return [F.linear(x[:, :m], shared.weight[:, :m], shared.bias) for m in self.widths]


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
