"""SwAV's codes and loss (Caron et al. 2020, sections 3.1 and 3.2; authors' main_swav.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.distributed import all_reduce_max, all_reduce_sum
from selfsight.nn.precision import full_precision


@full_precision
@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes that share the samples of all processes about evenly among the prototypes.

    The Sinkhorn-Knopp iteration on ``exp(scores / epsilon)``: divide every prototype by its sum over the samples of
    all processes, then every sample by its sum over the prototypes. It runs on logarithms, so that nothing overflows
    however small epsilon is; constant factors cancel.

    Args:
        scores: ``[B, K]`` of this process; B may differ between processes.
        epsilon: entropy of the codes; towards 0 they become one-hot.
        iterations: 3 in the paper.
    Returns:
        ``[B, K]``; rows sum to 1, columns nearly to ``B / K``.
    Raises:
        UserError: scores of another shape, no iterations, or an epsilon that is not positive.
    """
    if scores.ndim != 2:
        raise UserError(
            f"Sinkhorn was given scores {[*scores.shape]}; it takes [B, K], the samples of this process and "
            "their score for each prototype."
        )
    if iterations < 1 or epsilon <= 0:
        raise UserError(
            f"Sinkhorn was given {iterations} iterations and epsilon {epsilon}; it needs at least 1 iteration (the "
            "paper takes 3) and an epsilon above 0 (0.05)."
        )
    L = scores / epsilon
    for _ in range(iterations):
        L = L - _logsumexp_over_samples(L)
        L = L - L.logsumexp(dim=1, keepdim=True)
    return L.exp()


def _logsumexp_over_samples(L: Tensor) -> Tensor:
    """``[K]``: logsumexp over the rows of all processes."""
    largest = all_reduce_max(L.amax(dim=0))
    return largest + all_reduce_sum((L - largest).exp().sum(dim=0)).log()


@full_precision
def swapped_prediction(scores: Tensor, codes: Tensor, crops_for_assign: Sequence[int], *, temperature: float) -> Tensor:
    """Every crop predicts the code of each other crop that has one.

    ``L = 1/|A| sum_{a in A} 1/(M-1) sum_{v != a} 1/B sum_b - q_a[b] . log softmax(s_v[b] / temperature)``

    Means where the paper's equation 6 sums, as in the authors' code. ``ln K`` when predictions are uniform.

    Args:
        scores: ``[M, B, K]`` of all M crops.
        codes: ``[|A|, B, K]``, targets without gradient.
        crops_for_assign: A, the crop each entry of ``codes`` belongs to.
    Raises:
        UserError: a single crop, which has no other one to predict.
    """
    M, B, _ = scores.shape
    if M < 2:
        raise UserError("SwAV was given one crop of each image; it predicts codes from one crop to another: give two.")
    log_p = (scores / temperature).log_softmax(dim=-1)
    cross_entropy = -(codes.detach().flatten(1) @ log_p.flatten(1).T) / B  # [|A|, M]
    crops = torch.arange(M, device=scores.device)
    own = torch.stack([crops == a for a in crops_for_assign])
    return cross_entropy.masked_fill(own, 0).sum() / (len(codes) * (M - 1))
