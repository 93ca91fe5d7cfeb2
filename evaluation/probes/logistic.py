"""Fitting many linear classifiers on the same features at once: H heads as one ``[D, H C]`` matrix.

`fit_lbfgs` solves the convex problem, one head a penalty; `fit_sgd` runs SGD, one head a learning rate and decay.
Gradients are written out, since softmax regression's is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.evaluation.rows import Rows

BLOCK = 4_000_000  # logits kept at a time
CACHED_ROWS = 1024  # images a CPU keeps in its cache between the product for the logits and the one for the gradient
CURVATURE = 0.1  # of the cross-entropy along a logit: p (1 - p), about
GRAM_ROWS = 16  # rows per dimension


@dataclass(frozen=True)
class Linear:
    """H linear classifiers: weight ``[H, D, C]``, bias ``[H, C]``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, D]`` -> logits ``[n, H, C]``."""
        heads, width, classes = self.weight.shape
        flat = self.weight.permute(1, 0, 2).reshape(width, heads * classes)
        return torch.addmm(self.bias.flatten(), x, flat).view(-1, heads, classes)

    def only(self, head: int) -> Linear:
        """One of the heads, as a `Linear` of one."""
        return Linear(self.weight[head : head + 1], self.bias[head : head + 1])


def fit_lbfgs(
    x: Tensor | Rows,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    start: Linear | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 200,
    memory: int = 8,
) -> Linear:
    """Minimise  mean cross-entropy + lambda / 2 |W|^2  for every lambda at once, the bias free.

    Solved in coordinates in which it is well conditioned for every lambda: W = R V, R = Q diag(ev + lambda / h)^(-1/2),
    from the Gram matrix x'x / N = Q diag(ev) Q' and a typical curvature h of the loss. As Q is orthonormal the penalty
    is lambda / 2 sum_i R_i^2 |V_i|^2, and the objective is unchanged, whatever rows the Gram matrix is taken from. With
    fewer images than dimensions W lies in the span of the images, and Q is a basis of that span. Each head has its own
    memory, step length and end.

    Args:
        x: ``[N, D]`` centred features, in memory or `Rows`. labels: ``[N]`` int64 below ``classes``.
        start: heads to start from (one per penalty); default zero.
        tolerance: a head ends when the largest entry of its gradient in V falls below it.

    Returns:
        `Linear` with one head per penalty, in the original coordinates.
    """
    with torch.no_grad(), _flush_denormal():
        basis, ev = _basis(x)
        lambdas = torch.tensor([float(penalty) for penalty in penalties], dtype=x.dtype, device=x.device)[:, None]
        scale = (ev + lambdas / CURVATURE + 1e-6 * ev.max()).rsqrt()[:, :, None]  # [H, d, 1]
        objective = _SoftmaxObjective(x, labels, classes, lambdas, basis, scale)
        p = torch.zeros(len(lambdas), (len(ev) + 1) * classes, dtype=x.dtype, device=x.device)
        if start is not None:
            p = torch.cat([((basis.T @ start.weight) / scale).flatten(1), start.bias], dim=1)
        p = _lbfgs(objective, p, tolerance, max_steps, memory)
        v, bias = p[:, :-classes].unflatten(1, (-1, classes)), p[:, -classes:]
        return Linear(basis @ (scale * v), bias)


def fit_sgd(
    x: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    decays: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> Linear:
    """SGD with momentum on softmax regression from zero, one head per (rate, decay), cosine to 0 over the steps.

    Weight decay is added to the gradient, as in torch.optim.SGD, of weights and bias alike.

    Args:
        x: ``[N, D]``. labels: ``[N]``. rates, decays: H numbers each.
    """
    heads, (n, width) = len(rates), x.shape
    rate = torch.as_tensor(list(rates), dtype=x.dtype, device=x.device).repeat_interleave(classes)  # [H C]
    decay = torch.as_tensor(list(decays), dtype=x.dtype, device=x.device).repeat_interleave(classes)
    decayed = bool(decay.any())
    w = x.new_zeros(width + 1, heads * classes)  # the last row is the bias
    velocity = torch.zeros_like(w)
    gradient = torch.empty_like(w)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size
    with torch.no_grad(), _flush_denormal():
        for step in range(epochs * per_epoch):
            if step % per_epoch == 0:
                order = torch.randperm(n, generator=generator).to(x.device)
            rows = order[(step % per_epoch) * batch_size :][:batch_size]
            images = x[rows]
            error = torch.addmm(w[-1], images, w[:-1]).view(-1, heads, classes).softmax(dim=2)
            error.scatter_add_(
                2, labels[rows, None, None].expand(-1, heads, 1), error.new_full((len(rows), heads, 1), -1.0)
            )
            error = error.flatten(1).div_(len(rows))  # d loss / d logits, [B, H C]
            torch.mm(images.T, error, out=gradient[:-1])
            gradient[-1] = error.sum(dim=0)
            if decayed:
                gradient.addcmul_(w, decay)
            velocity.mul_(momentum).add_(gradient)
            cosine = 0.5 * (1 + math.cos(math.pi * step / (epochs * per_epoch)))
            w.addcmul_(velocity, rate * -cosine)
    return Linear(w[:-1].view(width, heads, classes).permute(1, 0, 2).contiguous(), w[-1].view(heads, classes).clone())


class _SoftmaxObjective:
    """Value and gradient of the penalised cross-entropy of some heads; parameters ``[H, (d + 1) C]``, the bias last."""

    def __init__(
        self, x: Tensor | Rows, labels: Tensor, classes: int, lambdas: Tensor, basis: Tensor, scale: Tensor
    ) -> None:
        self.x, self.labels, self.classes, self.basis, self.scale = x, labels, classes, basis, scale
        self.penalty = lambdas[:, :, None] * scale.square()  # [all H, d, 1]

    def __call__(self, p: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """``[H, P]`` of the heads numbered ``which`` -> values ``[H]``, gradients ``[H, P]``."""
        heads, n = len(p), len(self.x)
        scale, penalty = self.scale[which], self.penalty[which]
        v, bias = p[:, : -self.classes].unflatten(1, (-1, self.classes)), p[:, -self.classes :].flatten()
        weight = (scale * v).transpose(1, 2).flatten(0, 1) @ self.basis.T  # [H C, D]
        loss = p.new_zeros(heads, dtype=torch.float64)
        slope_w, slope_b = torch.zeros_like(weight), torch.zeros_like(bias)
        # Images are the columns: products with few rows are far faster on a CPU than ones with few columns.
        rows = CACHED_ROWS if self.x.device.type == "cpu" else max(1, BLOCK // len(bias))
        for start in range(0, n, rows):
            x, labels = self.x[start : start + rows], self.labels[start : start + rows]
            logits = torch.addmm(bias[:, None], weight, x.T).view(heads, self.classes, -1)
            own = labels.expand(heads, 1, -1)
            logits -= logits.amax(dim=1, keepdim=True)
            true = logits.gather(1, own)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += (total.log() - true).sum(dim=(1, 2), dtype=torch.float64)
            error = logits.div_(total).scatter_add_(1, own, torch.full_like(true, -1.0)).flatten(0, 1)
            slope_w.addmm_(error, x)
            slope_b += error.sum(dim=1)
        slope_v = scale * (slope_w @ self.basis).view(heads, self.classes, -1).transpose(1, 2) / n + penalty * v
        value = loss / n + 0.5 * (penalty * v.square()).sum(dim=(1, 2), dtype=torch.float64)
        return value, torch.cat([slope_v.flatten(1), slope_b.view(heads, -1) / n], dim=1)


def _lbfgs(objective: _SoftmaxObjective, p: Tensor, tolerance: float, max_steps: int, memory: int) -> Tensor:
    """L-BFGS with backtracking on independent problems side by side, ``[H, P]``; the finished ones drop out."""
    result = p.clone()
    which = torch.arange(len(p), device=p.device)
    value, gradient = objective(p, which)
    noise = torch.finfo(p.dtype).eps  # gains below it are rounding
    history: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y [H, P] and 1 / s'y [H, 1], zero where curvature failed
    scale = p.new_full((len(p), 1), 2.0)  # cross-entropy on white features curves by at most 1/2
    going = gradient.abs().amax(dim=1) > tolerance
    for _ in range(max_steps):
        if not bool(going.all()):
            p, value, gradient, scale, which = p[going], value[going], gradient[going], scale[going], which[going]
            history = [(s[going], y[going], rho[going]) for s, y, rho in history]
        if not len(p):
            break
        direction = _two_loop(gradient, history, scale)
        slope = (gradient * direction).sum(dim=1, dtype=torch.float64)
        uphill = slope >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.double().square().sum(dim=1), slope)
        moved, new_value, new_gradient = _backtrack(objective, p, direction, slope, value, which, noise)
        s, y = moved - p, new_gradient - gradient
        sy, yy = (s * y).sum(dim=1, keepdim=True), y.square().sum(dim=1, keepdim=True)
        useful = sy > 1e-10 * yy
        history = [*history, (s, y, torch.where(useful, 1 / sy, 0.0))][-memory:]
        scale = torch.where(useful, sy / yy, scale)
        gain = value - new_value
        p, value, gradient = moved, new_value, new_gradient
        result[which] = p
        going = (gradient.abs().amax(dim=1) > tolerance) & (gain > noise * value.abs())
    return result


def _backtrack(
    objective: _SoftmaxObjective,
    p: Tensor,
    direction: Tensor,
    slope: Tensor,
    value: Tensor,
    which: Tensor,
    noise: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Points along the directions that lower the values enough, with values and gradients; a head without one stays."""
    step = p.new_ones(len(p))
    for attempt in range(21):
        moved = p + step[:, None] * direction
        new_value, new_gradient = objective(moved, which)
        accepted = (new_value <= value + 1e-4 * step * slope + noise * value.abs()) | (step == 0)
        if bool(accepted.all()):
            break
        step = torch.where(accepted, step, step / 4 if attempt < 19 else 0.0)
    return moved, new_value, new_gradient


def _two_loop(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """The quasi-Newton direction (Nocedal & Wright, algorithm 7.4), each head for itself."""
    q = -gradient
    alphas = []
    for s, y, rho in reversed(history):
        alpha = rho * (s * q).sum(dim=1, keepdim=True)
        q = q - alpha * y
        alphas.append(alpha)
    q = q * scale
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = q + s * (alpha - rho * (y * q).sum(dim=1, keepdim=True))
    return q


def _basis(x: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q ``[D, d]`` of the features' span and the Gram eigenvalues ``[d]``, d = min(N, D) at most.

    Of many rows an even sample gives eigenvalues good enough.
    """
    n, width = x.shape
    if n >= width:
        some = x[:: max(1, n // (GRAM_ROWS * width))]
        ev, q = torch.linalg.eigh(some.T @ some / len(some))
        return q, ev.clamp(min=0)
    _, singular, vt = torch.linalg.svd(x[:], full_matrices=False)
    kept = singular >= 1e-6 * singular[0]
    return vt[kept].T, singular[kept].square() / n


@contextmanager
def _flush_denormal() -> Iterator[None]:
    """Subnormal numbers as zero: probabilities far in the tails make CPUs crawl."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
