"""LeJEPA's loss and its regulariser SIGReg (Balestriero and LeCun 2025; galilai-group/lejepa)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.distributed import sum_over_ranks, world_size
from selfsight.nn.precision import full_precision


class LeJEPATerms(NamedTuple):
    """The loss and what it is made of, all scalars."""

    loss: Tensor
    invariance: Tensor
    sigreg: Tensor


@full_precision
def lejepa(
    z: Tensor,
    directions: Tensor,
    *,
    lambd: float,
    n_global: int | None = None,
    t_max: float = 3.0,
    points: int = 17,
) -> LeJEPATerms:
    """Views should agree with the mean of their image, and embeddings should look like a standard Gaussian.

    ``L = (1 - lambda) mean_{v,n,d} (z_v - mu)^2 + lambda mean_v SIGReg(z_v)``, ``mu = mean_{v global} z_v``. Nothing is
    detached. The regulariser is that of each view by itself, over the images of all processes.

    Args:
        z: ``[V, B, D]`` embeddings of this process, global views first.
        directions: ``[D, K]``, see `random_directions`; the same on all processes and for all views.
        n_global: views that the mean is taken of; None: all.
        t_max, points: see `epps_pulley`.
    """
    mean = z[:n_global].mean(0)  # [B, D]
    invariance = (z - mean).square().mean()
    regulariser = sigreg(z, directions, t_max=t_max, points=points)
    return LeJEPATerms(lambd * regulariser + (1 - lambd) * invariance, invariance, regulariser)


@full_precision
def sigreg(
    z: Tensor,
    directions: Tensor,
    *,
    t_max: float = 3.0,
    points: int = 17,
    reduction: Literal["mean", "sum", "none"] = "mean",
    clip: float | None = None,
) -> Tensor:
    """How far random projections of embeddings are from a standard Gaussian: `epps_pulley` along each direction.

    Args:
        z: ``[..., B, D]`` of this process. directions: ``[D, K]``, unit columns.
        reduction: ``mean`` or ``sum`` over everything, ``none`` gives ``[..., K]``.
        clip: statistics below it count as 0.
    """
    statistic = epps_pulley(z @ directions, t_max=t_max, points=points)  # [..., K]
    if clip is not None:
        statistic = torch.where(statistic < clip, 0.0, statistic)
    if reduction == "none":
        return statistic
    return statistic.sum() if reduction == "sum" else statistic.mean()


@full_precision
def epps_pulley(x: Tensor, *, t_max: float = 3.0, points: int = 17) -> Tensor:
    """The statistic of Epps and Pulley against N(0, 1), over the N rows of all processes.

    ``T = N int_{-t_max}^{t_max} |f(t) - phi(t)|^2 phi(t) dt`` with ``f(t) = mean_n exp(i t x_n)`` and
    ``phi(t) = exp(-t^2 / 2)``, by the trapezoid rule on ``points`` knots of [0, t_max], doubled. A perfect Gaussian
    scores about 1.05 (t_max 3) whatever N is, constant zeros 0.402 N. The paper's listing has 17 knots on [-5, 5]:
    other numbers.

    Args:
        x: ``[..., B, K]`` of this process, B equal on all processes.

    Returns:
        ``[..., K]``.
    """
    if points < 2 or t_max <= 0:
        raise UserError(
            f"SIGReg was given {points} points up to {t_max:g}; it integrates over 2 or more up to a number above 0 "
            "(the authors' code: 17 up to 3)."
        )
    t = torch.linspace(0, t_max, points, dtype=x.dtype, device=x.device)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * t_max / (points - 1))
    weights[[0, -1]] /= 2
    tx = x[..., None] * t  # [..., B, K, points]
    parts = torch.stack([tx.cos().mean(-3), tx.sin().mean(-3)])  # [2, ..., K, points]
    real, imaginary = sum_over_ranks(parts) / world_size()
    distance = (real - phi).square() + imaginary.square()
    return (distance @ (weights * phi)) * (x.shape[-2] * world_size())


def random_directions(step: int, dim: int, slices: int) -> Tensor:
    """``[dim, slices]`` float32 unit columns that follow from the step, so that all processes draw the same."""
    generator = torch.Generator().manual_seed(step)
    return unit_columns(torch.randn(dim, slices, generator=generator, dtype=torch.float32))


def unit_columns(x: Tensor) -> Tensor:
    """Columns of ``[D, K]`` divided by their norms."""
    return x / torch.linalg.vector_norm(x, dim=0)
