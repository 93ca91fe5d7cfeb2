"""NT-Xent, the loss of SimCLR (Chen et al. 2020, equation 1; google-research/simclr, objective.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfsight.errors import UserError, nearest
from selfsight.nn.distributed import gather, gather_without_grad, rank
from selfsight.nn.precision import full_precision
from selfsight.nn.sphere import shrunk

REDUCTIONS = ("sum_of_means", "mean_2n")


@full_precision
def ntxent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    reduction: str = "sum_of_means",
    memory: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Each projection has to find the other view of its image among the projections of all images on all processes.

    With ``h`` the rows of ``z1`` and ``z2`` divided by their norm, and ``p(a)`` the other view of anchor ``a``:

    ``l(a) = -log( exp(h_a . h_p(a) / temperature) / sum_{k != a} exp(h_a . h_k / temperature) )``

    ``L = mean over view 1 of l + mean over view 2 of l``. Where all projections agree, ``L = 2 ln(2N - 1)`` for N
    images on all processes.

    Args:
        z1, z2: ``[B, D]`` of this process, row i of both from the same image; B equal on all processes.
        normalize: False compares the projections as they are.
        reduction: ``sum_of_means`` as above and in the authors' code; ``mean_2n`` is half of it, the mean over all 2B
            anchors, as in the paper.
        memory: ``[K, D]`` unit rows, further negatives for every anchor.
        chunk_size: anchors handled at a time. The ``2B x 2N`` similarities then never exist at once, and are computed a
            second time in the backward pass; value and gradient are the same. None: all of them.

    Raises:
        UserError: unequal shapes, a temperature that is not positive, or an unknown reduction.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise UserError(f"NT-Xent compares two views [B, D] of the same images; got {[*z1.shape]} and {[*z2.shape]}.")
    if temperature <= 0:
        raise UserError(f"The temperature of NT-Xent is {temperature}; it has to be above 0 (0.1 to 0.5 is usual).")
    if reduction not in REDUCTIONS:
        raise UserError(
            f"The reduction of NT-Xent is '{reduction}'; one of {', '.join(REDUCTIONS)}."
            f"{nearest(reduction, REDUCTIONS)}"
        )
    if normalize:
        z1, z2 = unit(z1), unit(z2)
    anchors, B = torch.cat([z1, z2]), len(z1)  # [2B, D]
    keys = gather(anchors)  # [2N, D], of one process after the other
    itself = torch.arange(2 * B, device=z1.device) + rank() * 2 * B
    positive = itself.roll(B)
    if memory is not None:
        keys = torch.cat([keys, memory])

    def total(h: Tensor, itself: Tensor, positive: Tensor) -> Tensor:
        logits = (h / temperature) @ keys.T  # [b, 2N + K], the large one: changed in place
        logits = logits.scatter_(1, itself[:, None], -torch.inf)
        return F.cross_entropy(logits, positive, reduction="sum")

    if chunk_size is None or chunk_size >= 2 * B:
        summed = total(anchors, itself, positive)
    else:
        chunks = zip(*(t.split(chunk_size) for t in (anchors, itself, positive)), strict=True)
        summed = torch.stack([checkpoint(total, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return summed / (B if reduction == "sum_of_means" else 2 * B)


def unit(z: Tensor) -> Tensor:
    """Rows divided by their norm, of which at least 1e-6 is assumed: the authors' floor is 1e-12 on its square."""
    z = shrunk(z, 1)
    return z * z.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()


@torch.no_grad()
@full_precision
def cross_view_logits(z1: Tensor, z2: Tensor, *, temperature: float, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Similarities ``[B, N]`` of this process's first views to all second views, and the column ``[B]`` that is right.

    The authors measure contrast accuracy and entropy on these alone, the N images of the other view, so the accuracy is
    not that of the loss with its 2N - 1 candidates. Nothing flows back.
    """
    if normalize:
        z1, z2 = unit(z1), unit(z2)
    labels = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    return z1 @ gather_without_grad(z2).T / temperature, labels


def contrast_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of `cross_view_logits` rows whose largest entry is the right one."""
    return (logits.argmax(1) == labels).float().mean()


def contrast_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the softmax over `cross_view_logits` rows, in nats: ln N where nothing is recognised."""
    p = logits.softmax(1)
    return -(p * (p + 1e-8).log()).sum(1).mean()
