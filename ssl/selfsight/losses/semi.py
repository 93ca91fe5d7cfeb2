"""Loss terms of the semi-supervised baselines: FixMatch, FreeMatch, MixMatch, CoMatch and SimMatch.

``M`` unlabelled images, ``C`` classes, ``D`` dimensions of an embedding, ``K`` rows of a memory. Means run over all
rows, those that a mask leaves out counted. The forms follow the code in which the baselines' published numbers were
obtained (microsoft/Semi-supervised-learning, called USB; SimMatch also mingkai-zheng/SimMatch).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.nn.precision import full_precision


def _mean(per_row: Tensor, mask: Tensor | None) -> Tensor:
    return (per_row if mask is None else per_row * mask).mean()


@full_precision
def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """``- mean mask sum_c y_c log softmax(logits)_c``.

    Args:
        logits: ``[M, C]``; targets: ``[M]`` int64 classes or ``[M, C]`` distributions; mask: ``[M]`` weights.
    """
    return _mean(F.cross_entropy(logits, targets, reduction="none"), mask)


@full_precision
def squared_error(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """``mean mask 1/C sum_c (softmax(logits)_c - y_c)^2``: the Brier score per class. Shapes as in `cross_entropy`."""
    return _mean((logits.softmax(-1) - targets).square().mean(-1), mask)


@full_precision
def sharpen(p: Tensor, temperature: float) -> Tensor:
    """``p_c^(1/T) / sum_c p_c^(1/T)``, ``[M, C]`` (MixMatch eq. 7); the powers alone vanish at low temperatures."""
    return (p.log() / temperature).softmax(-1)


@full_precision
def guess(logits: Tensor, temperature: float) -> Tensor:
    """The mean prediction for several views ``[K, M, C]``, sharpened: ``[M, C]`` (MixMatch eq. 6 and 7)."""
    return sharpen(logits.softmax(-1).mean(0), temperature)


@full_precision
def gaussian_weights(confidence: Tensor, mean: Tensor, variance: Tensor, n_sigma: float) -> Tensor:
    """``exp(- min(c - mu, 0)^2 / (2 sigma^2 / n^2))``: 1 above the mean, a Gaussian below (SoftMatch eq. 5).

    Args:
        confidence: ``[M]``. mean, variance: of all confidences, scalars. n_sigma: n, how many standard deviations the
            Gaussian's own is divided by.
    """
    below = (confidence - mean).clamp(max=0)
    smallest = torch.finfo(variance.dtype).tiny  # where there is no variance 1 at the mean itself, and 0 below
    return (-below.square() / (2 * variance / n_sigma**2).clamp(min=smallest)).exp()


def interleave(x: Tensor) -> Tensor:
    """Rows of n batches ``[n, B, ...]`` exchanged, so that the first holds some of each; twice gives ``x`` back.

    Batches are cut into n blocks, the last of them one longer where B does not divide, and block k of the first batch
    changes places with block k of batch k (MixMatch, for BatchNorm that learns its statistics from the first).
    """
    n, B = x.shape[:2]
    sizes = [B // n + (k >= n - B % n) for k in range(n)]
    start, y = 0, x.clone()
    for k, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[0, rows], y[k, rows] = x[k, rows], x[0, rows]
        start += size
    return y


def mix_up(x: Tensor, weight: float, order: Tensor) -> Tensor:
    """``l x + (1 - l) x[order]`` with ``l = max(weight, 1 - weight)``, so that each row stays nearest itself."""
    weight = max(weight, 1 - weight)
    return weight * x + (1 - weight) * x[order]


def _weighted_by_inverse(p: Tensor, histogram: Tensor) -> Tensor:
    """``norm(p / h)`` of ``[C]``, where a class that never occurs (h = 0) gets weight zero; zeros where all do.

    In logarithms: the running frequency of a class that is not predicted any more becomes so small that its inverse is
    infinite.
    """
    counts = (histogram > 0) & (p > 0)
    logs = torch.where(counts, p, 1.0).log() - torch.where(counts, histogram, 1.0).log()
    return logs.masked_fill(~counts & counts.any(), -torch.inf).softmax(-1) * counts.any()


@full_precision
def fairness(logits: Tensor, mask: Tensor, p_model: Tensor, histogram: Tensor) -> Tensor:
    """Self-adaptive fairness of FreeMatch: ``sum_c a_c log(b_c + 1e-12)``, to be minimised with a small weight.

    ``a = norm(p_model / histogram)`` is the running view of the classes, ``b = norm(mean p / h)`` that of the strong
    views the mask lets through, with ``p`` their softmax and ``h`` the frequencies of their predicted classes. Zero
    where the mask lets nothing through. (Wang et al., ICLR 2023, section 4.2; the sign is that of the authors' code.)

    Args:
        logits: ``[M, C]`` of the strong views; mask: ``[M]`` in {0, 1}; p_model, histogram: ``[C]`` running means.
    """
    p = logits.softmax(-1)
    predicted = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    share = mask / mask.sum().clamp(min=1)  # [M]
    a = _weighted_by_inverse(p_model, histogram)
    b = _weighted_by_inverse(share @ p, share @ predicted)
    return torch.where(mask.any(), (a * (b + 1e-12).log()).sum(), 0.0)


@full_precision
def pseudo_label_graph(p: Tensor, threshold: float) -> Tensor:
    """Which images belong together, by their pseudo-labels (CoMatch eq. 6): ``[M, C]`` to row-stochastic ``[M, M]``.

    ``Q = P P^T`` with a diagonal of ones; entries below ``threshold`` are dropped and rows normalised.
    """
    q = (p @ p.T).fill_diagonal_(1.0)
    q = q * (q >= threshold)
    return q / q.sum(1, keepdim=True)


@full_precision
def graph_contrast(z: Tensor, z_other: Tensor, graph: Tensor, temperature: float) -> Tensor:
    """``- mean_i sum_j Q_ij log(softmax_j(z_i . z'_j / T) + 1e-7)``: embeddings of two strong views follow the graph.

    Args:
        z, z_other: ``[M, D]`` unit norm; graph: ``[M, M]`` from `pseudo_label_graph`.
    """
    edges = (z @ z_other.T / temperature).softmax(-1)
    return -(graph * (edges + 1e-7).log()).sum(1).mean()


@full_precision
def similarity(z: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """``softmax_j(z . bank_j / T)``: ``[M, D]`` and ``[K, D]`` to ``[M, K]``."""
    return (z @ bank.T / temperature).softmax(-1)


@full_precision
def log_similarity(z: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Logarithm of `similarity`, which at low temperatures is 0 for all but the nearest rows."""
    return (z @ bank.T / temperature).log_softmax(-1)


@full_precision
def smoothed(p: Tensor, z: Tensor, bank: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """``alpha p + (1 - alpha) softmax(z . bank / T) Y``: labels of a memory, weighted by similarity (CoMatch eq. 4).

    Args:
        p: ``[M, C]``; z: ``[M, D]``; bank: ``[K, D]``; labels: ``[K, C]`` distributions Y.
    """
    return alpha * p + (1 - alpha) * similarity(z, bank, temperature) @ labels


@full_precision
def unfold(edges: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    """`unfold_log` of ``edges [M, K]`` from `similarity`, of which those that are 0 stay so whatever their class."""
    return unfold_log(edges.log(), p, labels)


@full_precision
def unfold_log(log_edges: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    """Instance distribution calibrated by the classes (SimMatch eq. 9): ``norm(edges_j p_{label_j})``, ``[M, K]``.

    Where p has no weight on any class of the bank, nothing can be calibrated and the edges are returned.

    Args:
        log_edges: ``[M, K]`` from `log_similarity`; p: ``[M, C]``; labels: ``[K]`` int64 classes of the bank's rows.
    """
    calibrated = log_edges + p.log()[:, labels]
    possible = (calibrated > -torch.inf).any(-1, keepdim=True)
    return torch.where(possible, calibrated, log_edges).softmax(-1)


@full_precision
def aggregate(edges: Tensor, p: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Class distribution smoothed by the neighbours: ``s p + (1 - s) sum_{j: label_j = c} edges_j``, ``[M, C]``."""
    return smoothing * p + (1 - smoothing) * torch.zeros_like(p).index_add(1, labels, edges)


@full_precision
def instance_consistency(z: Tensor, bank: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``- sum_j target_j log softmax_j(z . bank_j / T)`` for each of ``M`` strong views, ``[M]`` (SimMatch eq. 5).

    Args:
        z: ``[M, D]``; bank: ``[K, D]``; targets: ``[M, K]`` from `unfold_log`.
    """
    return -(targets * (z @ bank.T / temperature).log_softmax(-1)).sum(-1)
