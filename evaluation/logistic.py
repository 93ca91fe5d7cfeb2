"""Fitting many linear classifiers on the same features at once: H heads as one ``[D, H C]`` matrix.

`fit_lbfgs` solves the convex problem, one head a penalty; `fit_sgd` runs SGD, one head a learning rate and decay.
Gradients are written out, since softmax regression's is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4_000_000  # logits kept at a time: 16 MB stays near the processor
WHITENING_FLOOR = 1e-3


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
    x: Tensor,
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

    The features are whitened first: with the Gram matrix x'x / N = Q diag(ev) Q', R = Q diag(ev + 1e-3)^(-1/2) and
    Z = x R the problem in V (W = R V) is well conditioned, and the penalty becomes
    lambda / 2 sum_i V_i^2 / (ev_i + 1e-3): the objective is unchanged. With fewer images than dimensions W lies in the
    span of the images, and Q is a basis of that span. Each head has its own memory, step length and end.

    Args:
        x: ``[N, D]`` centred features. labels: ``[N]`` int64 below ``classes``.
        start: heads to start from (one per penalty); default zero.
        tolerance: a head ends when the largest entry of its gradient in V falls below it.

    Returns:
        `Linear` with one head per penalty, in the original coordinates.
    """
    with torch.no_grad(), _flush_denormal():
        basis, ev = _basis(x)
        scale = (ev + WHITENING_FLOOR).rsqrt()
        z = x @ (basis * scale)  # [N, d]
        objective = _SoftmaxObjective(
            z, labels, classes, torch.as_tensor(list(penalties), dtype=x.dtype), scale.square()
        )
        p = x.new_zeros(len(penalties), (z.shape[1] + 1) * classes)
        if start is not None:
            v = (basis.T @ start.weight) / scale[:, None]  # [H, d, C]
            p = torch.cat([v.flatten(1), start.bias], dim=1)
        p = _lbfgs(objective, p, tolerance, max_steps, memory)
        v, bias = p[:, :-classes].unflatten(1, (-1, classes)), p[:, -classes:]
        return Linear((basis * scale) @ v, bias)


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
    """Value and gradient of the penalised cross-entropy for H heads; parameters ``[H, (d + 1) C]``, the bias last."""

    def __init__(self, z: Tensor, labels: Tensor, classes: int, penalties: Tensor, penalised: Tensor) -> None:
        self.z, self.labels, self.classes = z, labels, classes
        # lambda / (ev + floor) for each whitened direction, 0 for the bias
        weights = torch.cat([penalised, penalised.new_zeros(1)])
        self.penalty = (penalties.to(z.device)[:, None] * weights).repeat_interleave(classes, dim=1)  # [H, (d+1) C]

    def __call__(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """``[H, P]`` -> values ``[H]``, gradients ``[H, P]``."""
        heads, n = len(p), len(self.z)
        flat = p.unflatten(1, (-1, self.classes)).permute(1, 0, 2).reshape(-1, heads * self.classes)  # [d + 1, H C]
        loss = p.new_zeros(heads, dtype=torch.float64)
        gradient = torch.zeros_like(flat)
        rows = max(1, BLOCK // flat.shape[1])
        for start in range(0, n, rows):
            z, labels = self.z[start : start + rows], self.labels[start : start + rows]
            logits = torch.addmm(flat[-1], z, flat[:-1]).view(len(z), heads, self.classes)
            own = labels[:, None, None].expand(-1, heads, 1)
            logits -= logits.amax(dim=2, keepdim=True)
            true = logits.gather(2, own)
            total = logits.exp_().sum(dim=2, keepdim=True)
            loss += (total.log() - true).sum(dim=(0, 2), dtype=torch.float64)
            error = logits.div_(total).scatter_add_(2, own, torch.full_like(true, -1.0)).flatten(1)
            gradient[:-1].addmm_(z.T, error)
            gradient[-1] += error.sum(dim=0)
        gradient = gradient.view(-1, heads, self.classes).permute(1, 0, 2).reshape(heads, -1) / n
        value = loss / n + 0.5 * (self.penalty * p.square()).sum(dim=1, dtype=torch.float64)
        return value, gradient + self.penalty * p


def _lbfgs(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]], p: Tensor, tolerance: float, max_steps: int, memory: int
) -> Tensor:
    """L-BFGS with backtracking, H independent problems side by side ``[H, P]``."""
    value, gradient = objective(p)
    noise = torch.finfo(p.dtype).eps  # gains below it are rounding
    history: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y [H, P] and 1 / s'y [H, 1], zero where curvature failed
    scale = p.new_full((len(p), 1), 2.0)  # cross-entropy on white features curves by at most 1/2
    running = gradient.abs().amax(dim=1) > tolerance
    for _ in range(max_steps):
        if not bool(running.any()):
            break
        direction = _two_loop(gradient, history, scale)
        slope = (gradient * direction).sum(dim=1, dtype=torch.float64)
        uphill = slope >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.double().square().sum(dim=1), slope)
        step = torch.where(running, 1.0, 0.0).to(p.dtype)
        for _ in range(20):
            moved = p + step[:, None] * direction
            new_value, new_gradient = objective(moved)
            slack = noise * value.abs()
            accepted = (new_value <= value + 1e-4 * step * slope + slack) | (step == 0)
            if bool(accepted.all()):
                break
            step = torch.where(accepted, step, step / 4)
        else:
            step = torch.where(accepted, step, 0.0)
            running = running & accepted
            moved = p + step[:, None] * direction
            new_value, new_gradient = objective(moved)
        s, y = moved - p, new_gradient - gradient
        sy = (s * y).sum(dim=1, keepdim=True)
        yy = y.square().sum(dim=1, keepdim=True)
        useful = sy > 1e-10 * yy
        history = [*history, (s, y, torch.where(useful, 1 / sy, 0.0))][-memory:]
        scale = torch.where(useful, sy / yy, scale)
        gain = value - new_value
        p, value, gradient = moved, new_value, new_gradient
        running = running & (gradient.abs().amax(dim=1) > tolerance) & (gain > noise * value.abs())
    return p


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


def _basis(x: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q ``[D, d]`` of the features' span and the Gram eigenvalues ``[d]``, d = min(N, D) at most."""
    n, width = x.shape
    if n >= width:
        ev, q = torch.linalg.eigh(x.T @ x / n)
        return q, ev.clamp(min=0)
    _, singular, vt = torch.linalg.svd(x, full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    return vt[kept].T, singular[kept].square() / n


@contextmanager
def _flush_denormal() -> Iterator[None]:
    """Subnormal numbers as zero: probabilities far in the tails make CPUs crawl."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
