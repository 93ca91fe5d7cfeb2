"""The four consistencies of SimMatchV2 (Zheng et al., ICCV 2023) as functions of tensors.

A sample is a node that carries a class distribution; nodes are joined by edges, the softmax of their similarities.
Weak views are seen by the teacher and strong ones by the student. Symbols: ``z`` unit-norm embeddings ``[M, D]``,
``p`` aligned teacher probabilities ``[M, C]``, ``t`` the one temperature of all edges, ``K`` rows in the bank of
unlabelled embeddings. The student's tensors may carry a leading axis of strong views: ``[S, M, ...]``.

Everything is computed in float32, or in float64 where the input is float64: of the K entries of an edge row nearly
all lie below what half precision can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.nn.precision import full_precision


@full_precision
def align(q: Tensor, running_mean: Tensor) -> Tensor:
    """Distribution alignment towards uniform: ``p_c = (q_c / m_c) / sum_c (q_c / m_c)``.

    Args:
        q: ``[M, C]`` teacher probabilities.
        running_mean: ``[C]`` or ``[1, C]`` running mean of raw teacher probabilities, as it was before this batch.
    """
    # in logarithms: the mean of a class that is never predicted becomes 0 in float32
    smallest = torch.finfo(running_mean.dtype).tiny
    return (q.log() - running_mean.clamp(min=smallest).log()).softmax(-1)


@full_precision
def log_edges(z: Tensor, bank: Tensor, t: float) -> Tensor:
    """``log softmax_j(z . bank_j / t)``: ``[..., M, D]`` and ``[K, D]`` to ``[..., M, K]``.

    The authors take the logarithm after the softmax, which underflows in float32 at low temperature; the value is the
    same where theirs is finite.
    """
    return (z @ bank.T / t).log_softmax(-1)


@full_precision
def graph(nodes: Tensor, t: float) -> Tensor:
    """Row-stochastic adjacency without self-edges: ``softmax_rows(F F^T / t, diagonal at -infinity)``.

    Args:
        nodes: ``[M, n + 1, D]``, several graphs of n + 1 nodes; each graph needs at least two nodes.

    Returns:
        ``[M, n + 1, n + 1]``, not symmetric.
    """
    similarity = nodes @ nodes.transpose(1, 2) / t
    itself = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, -torch.inf).softmax(-1)


@full_precision
def propagation(adjacency: Tensor, alpha: float) -> Tensor:
    """Weights with which the labels of all nodes reach node 0: row 0 of ``(1 - alpha) (I - alpha W)^-1``.

    The row is found by solving ``(I - alpha W)^T v = e_0``; the weights sum to one.

    Args:
        adjacency: ``[M, n + 1, n + 1]`` from `graph`.
        alpha: share of a label that is handed on along the edges, in [0, 1).

    Returns:
        ``[M, n + 1]``.
    """
    identity = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
    system = (identity - alpha * adjacency).transpose(1, 2)
    first = identity[0].expand(len(adjacency), -1)
    return (1 - alpha) * torch.linalg.solve(system, first)


@full_precision
def refine(z: Tensor, p: Tensor, l_bank: Tensor, l_labels: Tensor, *, n: int, t: float, alpha: float) -> Tensor:
    """Edge-node consistency: the label of each sample after propagation from its ``n`` nearest labelled embeddings.

    Args:
        z: ``[M, D]`` teacher embeddings of the unlabelled images; p: ``[M, C]`` their aligned probabilities.
        l_bank: ``[N, D]``; l_labels: ``[N]`` int64.
        n: neighbours, at most N.

    Returns:
        r ``[M, C]``, a distribution per row.
    """
    nearest, weights = neighbourhood(z, l_bank, n=n, t=t, alpha=alpha)
    labels = torch.cat([p[:, None], F.one_hot(l_labels[nearest], p.shape[-1]).to(p.dtype)], dim=1)  # [M, n + 1, C]
    return (weights[:, None] @ labels)[:, 0]


@full_precision
def neighbourhood(z: Tensor, l_bank: Tensor, *, n: int, t: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The ``n`` nearest labelled embeddings of each sample, and how much its own and their labels count.

    Returns:
        rows of ``l_bank`` ``[M, n]``, and weights ``[M, n + 1]`` that sum to one, the sample's own in front.
    """
    nearest = (z @ l_bank.T).topk(n, dim=-1).indices  # [M, n]
    nodes = torch.cat([z[:, None], l_bank[nearest]], dim=1)  # [M, n + 1, D]
    return nearest, propagation(graph(nodes, t), alpha)


@full_precision
def node_node(logits: Tensor, r: Tensor, mask: Tensor) -> Tensor:
    """``- mean mask sum_c r_c log softmax(logits)_c`` over all ``S M`` rows, those that the mask leaves out counted.

    Args:
        logits: ``[S, M, C]`` of the student; r: ``[M, C]`` refined labels; mask: ``[M]`` in {0, 1}.
    """
    cross_entropy = -(r * logits.log_softmax(-1)).sum(-1)
    return (mask * cross_entropy).mean()


@full_precision
def edge_edge(student: Tensor, teacher: Tensor) -> Tensor:
    """``- mean sum_j k_j log k^s_j``: cross-entropy of the student's edges with the teacher's.

    Args:
        student: ``[S, M, K]`` log-edges; teacher: ``[M, K]`` edges (probabilities).
    """
    return -(teacher * student).sum(-1).mean()


@full_precision
def node_edge(student: Tensor, p: Tensor, u_labels: Tensor) -> Tensor:
    """``- mean sum_c p_c log (k^s Y)_c``: labels gathered along the student's edges against the teacher's node.

    Where some aggregated probability is zero (an empty bank, underflow) the loss is infinite and, as in the authors'
    code, the whole term is replaced by zero for this step, value and gradient.

    Args:
        student: ``[S, M, K]`` log-edges; p: ``[M, C]``; u_labels: ``[K, C]`` labels Y of the bank's rows.
    """
    aggregated = student.exp() @ u_labels  # [S, M, C]
    usable = (aggregated > 0).all()
    return -(p * torch.where(usable, aggregated, 1.0).log()).sum(-1).mean()
