"""The losses' equations once more, in numbers of eighty digits that neither overflow nor vanish.

Arrays are NumPy's with mpmath's numbers as entries; every function writes its equation down as it stands in the paper,
powers before sums and logarithms last.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
from torch import Tensor

mpmath.mp.dps = 80
Exact = Any  # array of mpmath's numbers

exp, log = np.frompyfunc(mpmath.exp, 1, 1), np.frompyfunc(mpmath.log, 1, 1)
root = np.frompyfunc(mpmath.sqrt, 1, 1)
real = np.frompyfunc(mpmath.mpf, 1, 1)


def exact(x: Tensor) -> Exact:
    """The very values of a tensor; whole numbers and truth values stay as they are."""
    array = x.detach().double().numpy() if x.is_floating_point() else x.numpy()
    return real(array) if x.is_floating_point() else array


def unit(x: Exact, floor: str = "1e-12", axis: int = -1) -> Exact:
    length = root((x * x).sum(axis, keepdims=True))
    return x / np.maximum(length, mpmath.mpf(floor))


def softmax(s: Exact) -> Exact:
    e = exp(s)
    return e / e.sum(-1, keepdims=True)


def mean(x: Exact) -> Exact:
    return x.sum() / x.size


def cross_entropy(targets: Exact, logits: Exact) -> Exact:
    """``[...]``: of distributions ``[..., C]``."""
    return -(targets * log(softmax(logits))).sum(-1)


def one_hot(labels: Exact, classes: int) -> Exact:
    return real(np.eye(classes)[labels])


def norm(p: Exact) -> Exact:
    return p / p.sum(-1, keepdims=True)


def ntxent(z1: Exact, z2: Exact, T: Any, *, memory: Exact | None = None) -> Exact:
    h = np.concatenate([unit(z1, "1e-6"), unit(z2, "1e-6")])
    keys = h if memory is None else np.concatenate([h, memory])
    B, total = len(z1), mpmath.mpf(0)
    e = exp(h @ keys.T / T)
    for a in range(2 * B):
        total -= mpmath.log(e[a, (a + B) % (2 * B)] / np.delete(e[a], a).sum())
    return total / B


def supcon(f: Exact, labels: Exact | None, T: Any, *, summation: str, denominator: str) -> Exact:
    """Features ``[N, V, D]``; all views are anchors."""
    N, V, _ = f.shape
    f = unit(f).transpose(1, 0, 2).reshape(V * N, -1)
    classes = np.tile(np.arange(N) if labels is None else labels, V)
    e, total = exp(f @ f.T / T), mpmath.mpf(0)
    for a in range(V * N):
        others = [c for c in range(V * N) if c != a]
        positives = [c for c in others if classes[c] == classes[a]]
        negatives = [c for c in others if classes[c] != classes[a]]
        if not positives or (denominator == "only_negatives" and not negatives):
            continue
        among = others if denominator == "all" else negatives
        rest = sum((e[a, c] for c in among), mpmath.mpf(0))
        p = [e[a, c] / (rest + e[a, c] if denominator == "one_positive" else rest) for c in positives]
        count = len(positives)
        total -= sum(map(mpmath.log, p)) / count if summation == "out" else mpmath.log(sum(p) / count)
    return total / (V * N)


def sinkhorn(scores: Exact, epsilon: Any, iterations: int) -> Exact:
    Q = exp(scores / epsilon)
    for _ in range(iterations):
        Q = Q / Q.sum(0, keepdims=True)
        Q = Q / Q.sum(1, keepdims=True)
    return Q


def swapped_prediction(scores: Exact, codes: Exact, crops: tuple[int, ...], T: Any) -> Exact:
    M, total = len(scores), mpmath.mpf(0)
    for q, a in zip(codes, crops, strict=True):
        total += sum(mean(cross_entropy(q, scores[v] / T)) for v in range(M) if v != a) / (M - 1)
    return total / len(crops)


def pixel_consistency(q: Exact, k: Exact, A: Exact) -> Exact:
    total = mpmath.mpf(0)
    for s, pairs in zip(_similarities(q, k), A, strict=True):
        total -= 2 * (s * pairs).sum() / (int(pairs.sum()) + mpmath.mpf("1e-6"))
    return total / len(q)


def pixel_contrast(q: Exact, k: Exact, A: Exact, T: Any) -> Exact:
    total = mpmath.mpf(0)
    for s, pairs in zip(_similarities(q, k), A, strict=True):
        e = exp(s / T)
        pixels = [-mpmath.log(row[p].sum() / row.sum()) for row, p in zip(e, pairs, strict=True) if p.any()]
        total += sum(pixels) / max(1, len(pixels))
    return total / len(q)


def _similarities(q: Exact, k: Exact) -> list[Exact]:
    """``[HW, HW]`` for each image."""
    q, k = (unit(x, axis=1).reshape(*x.shape[:2], -1) for x in (q, k))
    return [a.T @ b for a, b in zip(q, k, strict=True)]


def propagate(x: Exact, g: Exact, exponent: int) -> Exact:
    s = [np.maximum(a, mpmath.mpf(0)) ** exponent for a in _similarities(x, x)]
    values = unit(g, axis=1).reshape(*g.shape[:2], -1)
    return np.stack([v @ a.T for v, a in zip(values, s, strict=True)]).reshape(g.shape)


def masked_patch_loss(reconstruction: Exact, images: Exact, active: Exact, patch: int) -> Exact:
    total, hidden = mpmath.mpf(0), 0
    for b, y, x in zip(*np.nonzero(~active[:, 0]), strict=True):
        cell = (b, slice(None), slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch))
        pixels, predicted = images[cell].ravel(), reconstruction[cell].ravel()
        spread = ((pixels - mean(pixels)) ** 2).sum() / (pixels.size - 1)
        target = (pixels - mean(pixels)) / mpmath.sqrt(spread + mpmath.mpf("1e-6"))
        total, hidden = total + mean((predicted - target) ** 2), hidden + 1
    return total / (hidden + mpmath.mpf("1e-8"))


def fairness(logits: Exact, mask: Exact, p_model: Exact, histogram: Exact) -> Exact:
    p, C = softmax(logits), logits.shape[1]
    if not any(mask):
        return mpmath.mpf(0)
    chosen = [row for row, m in zip(p, mask, strict=True) if m]
    h = one_hot(np.array([int(np.argmax(row)) for row in chosen]), C)

    def weighted(p: Exact, h: Exact) -> Exact:
        return norm(np.array([a / b if b > 0 else mpmath.mpf(0) for a, b in zip(p, h, strict=True)]))

    b = weighted(np.stack(chosen).sum(0) / len(chosen), h.sum(0) / len(chosen))
    return (weighted(p_model, histogram) * log(b + mpmath.mpf("1e-12"))).sum()


def graph_contrast(z: Exact, other: Exact, graph: Exact, T: Any) -> Exact:
    edges = softmax(unit(z) @ unit(other).T / T)
    return -mean((graph * log(edges + mpmath.mpf("1e-7"))).sum(1))


def pseudo_label_graph(p: Exact, threshold: Any) -> Exact:
    q = p @ p.T
    q[np.diag_indices(len(q))] = mpmath.mpf(1)
    return norm(np.where(q >= threshold, q, mpmath.mpf(0)))


def unfold(z: Exact, bank: Exact, p: Exact, labels: Exact, T: Any) -> Exact:
    edges = softmax(unit(z) @ unit(bank).T / T)
    calibrated = edges * p[:, labels]
    lonely = calibrated.sum(1) == 0
    calibrated[lonely] = edges[lonely]
    return norm(calibrated)


def aggregate(edges: Exact, p: Exact, labels: Exact, smoothing: Any) -> Exact:
    return smoothing * p + (1 - smoothing) * edges @ one_hot(labels, p.shape[1])


def graph(nodes: Exact, T: Any) -> Exact:
    f = unit(nodes)
    e = exp(f @ f.transpose(0, 2, 1) / T) * (1 - np.eye(nodes.shape[1], dtype=int))
    return norm(e)


def refine(z: Exact, p: Exact, bank: Exact, labels: Exact, T: Any, n: int, alpha: Any) -> Exact:
    z, bank = unit(z), unit(bank)
    found = []
    for row, q in zip(z, p, strict=True):
        near = sorted(range(len(bank)), key=lambda j: -(row @ bank[j]))[:n]
        nodes = np.stack([row, *(bank[j] for j in near)])
        W = graph(nodes[None], T)[0]
        system = mpmath.matrix((np.eye(n + 1, dtype=int) - alpha * W).T.tolist())
        first = mpmath.matrix([1] + [0] * n)
        weights = np.array(list(mpmath.lu_solve(system, first))) * (1 - alpha)
        found.append(weights @ np.concatenate([q[None], one_hot(labels[near], len(q))]))
    return np.stack(found)


def node_edge(z: Exact, bank: Exact, p: Exact, u_labels: Exact, T: Any) -> Exact:
    k = softmax(unit(z) @ unit(bank).T / T)
    return mean(-(p * log(k @ u_labels)).sum(-1))


def spherical_kmeans(x: Exact, centroids: Exact) -> Exact:
    """Centroids after one round."""
    nearest = np.array([int(np.argmax(row)) for row in x @ centroids.T])
    totals = [x[nearest == k].sum(0) if (nearest == k).any() else centroids[k] for k in range(len(centroids))]
    return np.stack([unit(t) if any(t != 0) else c for t, c in zip(totals, centroids, strict=True)])


def jensen_shannon(p: Exact, q: Exact) -> Exact:
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entropy(p: Exact) -> Exact:
    return -(p * log(p)).sum(-1)


def adversarial(x: Exact, weight: Exact, labels: Exact, epsilon: Any) -> Exact:
    gradient = (softmax(x @ weight) - one_hot(labels, weight.shape[1])) @ weight.T
    return x + epsilon * np.frompyfunc(mpmath.sign, 1, 1)(gradient)


def cluster_ntxent(z1: Exact, z2: Exact, clusters: Exact, T: Any) -> Exact:
    z, B = np.concatenate([unit(z1), unit(z2)]), len(z1)
    e, costs = exp(z @ z.T / T), []
    for a in range(2 * B):
        rivals = [c for c in range(2 * B) if c != a and clusters[c % B] == clusters[a % B]]
        costs.append(-mpmath.log(e[a, (a + B) % (2 * B)] / e[a, rivals].sum()))
    return np.array(costs)


def weighted_binary_cross_entropy(logits: Exact, targets: Exact) -> Exact:
    total = mpmath.mpf(0)
    for row, present in zip(logits, targets, strict=True):
        for s, is_there in zip(row, present, strict=True):
            weight = mpmath.mpf(len(row)) / int(present.sum()) if is_there else 1
            total += weight * mpmath.log(1 + mpmath.exp(-s if is_there else s))
    return total / logits.size


def slope(function: Any, arrays: dict[str, Exact], direction: dict[str, Exact]) -> Any:
    """Derivative along a direction, by a central difference with a step of which the square vanishes."""
    h = mpmath.mpf(10) ** -30
    ahead, behind = (
        function(**{name: a + sign * h * direction[name] if name in direction else a for name, a in arrays.items()})
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * h)
