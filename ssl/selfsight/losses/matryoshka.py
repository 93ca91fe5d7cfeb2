"""The sum of a loss over prefixes of an embedding (Kusupati et al. 2022, equation 1; RAIVNLab/MRL, MRL.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.matryoshka import prefixes
from selfsight.nn.precision import full_precision


def over_prefixes(
    loss: Callable[..., Tensor], widths: Sequence[int], *embeddings: Tensor, importance: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_m c_m loss(z[:, :m], ...)``: the sum, not the mean, and the losses ``[L]`` of the prefixes by themselves.

    Args:
        loss: of embeddings, such as NT-Xent; it normalises each prefix by itself where it compares directions.
        widths: m, see `selfsight.nn.matryoshka.checked_widths`.
        embeddings: ``[B, D]`` each. importance: c, 1 each if None (all published models).
    """
    cut = zip(*(prefixes(z, widths) for z in embeddings), strict=True)
    losses = torch.stack([loss(*level) for level in cut])
    return weighted_sum(losses, importance), losses


@full_precision
def matryoshka(
    logits: Sequence[Tensor], target: Tensor, *, importance: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """``sum_m c_m CE(logits_m, y)`` for the logits ``[B, C]`` of every prefix and classes ``[B]``."""
    losses = torch.stack([F.cross_entropy(level, target, label_smoothing=label_smoothing) for level in logits])
    return weighted_sum(losses, importance)


def weighted_sum(losses: Tensor, importance: Sequence[float] | None = None) -> Tensor:
    """``sum_m c_m L_m`` of the losses ``[L]`` of the prefixes.

    Raises:
        UserError: other than one weight for each.
    """
    if importance is None:
        return losses.sum()
    if len(importance) != len(losses):
        raise UserError(f"{len(importance)} weights were given for {len(losses)} nested dimensions; give one for each.")
    return (losses * torch.as_tensor(importance, dtype=losses.dtype, device=losses.device)).sum()
