"""Every loss at the edge of what it may be given, against its equation in numbers of eighty digits.

Temperatures from 1e-4 to 1e4, features that are zero, huge or half precision, batches of one, classes that nobody or
a single image has. Values, and derivatives along a random direction.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import selfsight.losses
from selfsight.losses import (
    barlow,
    byol,
    clip,
    cotraining,
    deepclusterv2,
    dino,
    distillation,
    feature_distillation,
    mae,
    mcl,
    mixing,
    mocov3,
    multilabel,
    ntxent,
    pixpro,
    rotation,
    semi,
    simmatchv2,
    simsiam,
    spark,
    swav,
    vicreg,
)
from selfsight.losses import supcon as contrast
from selfsight.nn.patches import patchify
from selfsight.nn.propagation import PixelPropagation
from selfsight.nn.sphere import normalise

from . import exactly

TEMPERATURES = (1e-4, 0.1, 1e4)
SETTINGS = ("plain", "zero", "huge", "half", "one", "lonely")
EPSILON = torch.finfo(torch.float32).eps
B, C, D, K = 5, 4, 6, 7


@dataclass
class Given:
    """Draws the tensors of one setting."""

    setting: str
    generator: torch.Generator

    @property
    def rows(self) -> int:
        return 1 if self.setting == "one" else B

    def features(self, *shape: int) -> Tensor:
        x = torch.randn(*shape, generator=self.generator)
        if self.setting == "zero":
            x.zero_()
        if self.setting == "huge":
            x *= 1e18
        return x.half() if self.setting == "half" else x

    def logits(self, *shape: int) -> Tensor:
        return 3 * self.features(*shape)

    def unit(self, *shape: int) -> Tensor:
        return normalise(torch.randn(*shape, generator=self.generator), dim=-1)

    def probabilities(self, *shape: int) -> Tensor:
        p = (3 * torch.randn(*shape, generator=self.generator)).softmax(-1)
        if self.setting in ("zero", "lonely"):  # a class is out of the question, here or everywhere
            p[..., 0] = 0
            p = p / p.sum(-1, keepdim=True)
        return p

    def labels(self, count: int, classes: int = C) -> Tensor:
        """With ``lonely`` class 0 has one image and the last class none."""
        labels = torch.randint(0, classes, (count,), generator=self.generator)
        if self.setting == "lonely":
            labels = 1 + labels % max(1, classes - 2)
            labels[0] = 0
        return labels

    def pairs(self, *shape: int) -> Tensor:
        A = torch.rand(*shape, generator=self.generator) < 0.4
        A[0, 0] = False  # a pixel without a positive
        if self.setting == "lonely":
            A[0] = False
        return A


@dataclass
class Equation:
    """A loss of ours, the same by definition, and what both are given.

    Attributes:
        trained: names of what gradients flow to.
        temperatures: passed as T to both.
    """

    draw: Callable[[Given], dict[str, Tensor]]
    ours: Callable[..., Tensor]
    exact: Callable[..., Any]
    trained: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = TEMPERATURES


def sphere(function: Callable[..., Tensor], *names: str, dim: int = -1) -> Callable[..., Tensor]:
    """The function of arguments that are first brought to length 1, as methods do."""

    def normalised(T: float, **tensors: Tensor) -> Tensor:
        lifted = {n: normalise(t.float(), dim=dim) if n in names else t for n, t in tensors.items()}
        return function(T=T, **lifted)

    return normalised


def two(given: Given, *shape: int, names: tuple[str, str] = ("z1", "z2")) -> dict[str, Tensor]:
    return {name: given.features(*shape) for name in names}


def maps(given: Given) -> dict[str, Tensor]:
    return two(given, given.rows, D, 2, 2, names=("q", "k")) | {"A": given.pairs(given.rows, 4, 4)}


def four(given: Given) -> dict[str, Tensor]:
    return two(given, given.rows, D, names=("p1", "p2")) | two(given, given.rows, D)


def columns(given: Given) -> dict[str, Tensor]:
    """At least two images, of the size that features are: what takes variances is given neither one nor 1e18."""
    sized = Given("plain" if given.setting in ("one", "huge") else given.setting, given.generator)
    return two(sized, B, D)


def crops(given: Given) -> dict[str, Tensor]:
    found = {"student": given.logits(4, given.rows, C), "teacher": given.logits(2, given.rows, C)}
    return found | {"centre": torch.linspace(-1, 1, C)}


def exact_dino(T: Any, student: Any, teacher: Any, centre: Any) -> Any:
    targets = exactly.softmax((teacher - centre) / (T / 2))
    pairs = [(a, v) for a in range(len(teacher)) for v in range(len(student)) if a != v]
    return sum(exactly.mean(exactly.cross_entropy(targets[a], student[v] / T)) for a, v in pairs) / len(pairs)


def confidences(given: Given) -> dict[str, Tensor]:
    """One of them the mean itself."""
    confidence = given.probabilities(given.rows, C).amax(1)
    variance = torch.tensor({"zero": 0.0, "huge": 1e-37}.get(given.setting, 0.04))
    return {"confidence": confidence, "mean": confidence.median(), "variance": variance}


def exact_weights(T: Any, confidence: Any, mean: Any, variance: Any) -> Any:
    """Of no variance the limit: 1 at the mean, 0 below."""

    def weight(c: Any) -> Any:
        if c >= mean or variance == 0:
            return mpmath.mpf(c >= mean)
        return mpmath.exp(-((c - mean) ** 2) / (2 * variance * T**2))

    return np.array([weight(c) for c in confidence], dtype=object)


def exact_vicreg(T: Any, z1: Any, z2: Any) -> Any:
    def spread(z: Any) -> tuple[Any, Any]:
        z = z - z.sum(0) / len(z)
        C = z.T @ z / (len(z) - 1)
        hinges = [max(mpmath.mpf(0), 1 - mpmath.sqrt(C[d, d] + mpmath.mpf("1e-4"))) for d in range(D)]
        return sum(hinges) / D, ((C * C).sum() - sum(C[d, d] ** 2 for d in range(D))) / D

    (v1, c1), (v2, c2) = spread(z1), spread(z2)
    return exactly.mean((z1 - z2) ** 2) + (v1 + v2) / 2 + c1 + c2


def exact_barlow(T: Any, z1: Any, z2: Any) -> Any:
    C = z1.T @ z2 / len(z1)
    diagonal = [C[d, d] for d in range(D)]
    return sum((c - 1) ** 2 for c in diagonal) + (C * C).sum() - sum(c**2 for c in diagonal)


def chosen(given: Given, rows: int) -> Tensor:
    mask = (torch.rand(rows, generator=given.generator) < 0.6).float()
    return torch.zeros_like(mask) if given.setting == "one" else mask


def fair(given: Given) -> dict[str, Tensor]:
    """Running frequencies of which one has all but vanished: its inverse is no number of float32 any more."""
    frequencies = given.probabilities(C)
    if given.setting != "zero":
        frequencies[1] = 1e-39
    rows = given.rows
    logits = given.logits(rows, C) + 0.01 * torch.arange(C)  # no ties: the most probable class counts
    return {
        "logits": logits, "mask": chosen(given, rows), "p_model": given.probabilities(C),
        "histogram": frequencies,
    }  # fmt: skip


def neighbours(given: Given) -> dict[str, Tensor]:
    """Embeddings, a bank and its labels; the teacher is sure of a class that the bank does not have, for one row."""
    p = given.probabilities(given.rows, C)
    if given.setting == "lonely":
        p[0] = torch.eye(C)[C - 1]
    return {
        "z": given.features(given.rows, D), "bank": given.features(K, D), "p": p, "labels": given.labels(K),
    }  # fmt: skip


def edges(given: Given) -> dict[str, Tensor]:
    found = {"student": given.features(2, given.rows, D), "bank": given.unit(K, D)}
    return found | {"teacher": given.probabilities(given.rows, K)}


def images(given: Given) -> dict[str, Tensor]:
    """Cells of 4 x 4 pixels; ``lonely``: one cell is of one colour. Pixels are of the size that pixels are."""
    x = torch.randn(given.rows, 3, 8, 12, generator=given.generator)
    if given.setting in ("lonely", "zero"):
        x[:, :, :4, :4] = 0.5
    active = torch.rand(given.rows, 1, 2, 3, generator=given.generator) < 0.4
    active[0, 0, 0, 0] = given.setting == "one"
    predicted = given.features(given.rows, 3, 8, 12)
    return {"reconstruction": predicted, "images": x.half() if given.setting == "half" else x, "active": active}


def clusters(given: Given) -> dict[str, Tensor]:
    assigned = given.labels(given.rows, K)
    if given.setting == "lonely":
        assigned[1:] = deepclusterv2.UNASSIGNED
    return {"scores": given.logits(2 * given.rows, K), "clusters": assigned}


def exact_clusters(T: Any, scores: Any, clusters: Any) -> Any:
    target = np.tile(clusters, 2)
    known = target != deepclusterv2.UNASSIGNED
    return exactly.mean(exactly.cross_entropy(exactly.one_hot(target[known], K), scores[known] / T))


def exact_distillation_with_labels(T: Any, student: Any, teacher: Any, labels: Any) -> Any:
    known = labels >= 0
    hard = exactly.cross_entropy(exactly.one_hot(labels[known], C), student[known])
    soft = exactly.mean(exactly.cross_entropy(exactly.softmax(teacher / T), student / T))
    return mpmath.mpf(0.75) * (exactly.mean(hard) if len(hard) else 0) + mpmath.mpf(0.25) * soft


def similar(z: Any, teacher: Any, queue: Any) -> Any:
    """``[B, 1 + K]``: to the teacher's embedding of the same image, and to those of the queue."""
    return np.concatenate([(z * exactly.unit(teacher)).sum(1, keepdims=True), z @ queue.T], axis=1)


def partly_labelled(given: Given) -> dict[str, Tensor]:
    labels = given.labels(given.rows)
    labels[1:] = -1
    if given.setting == "one":
        labels[:] = -1
    return {"student": given.logits(given.rows, C), "teacher": given.logits(given.rows, C), "labels": labels}


def fooled(given: Given) -> dict[str, Tensor]:
    """Images of a linear network; where things are huge, it is sure of its answers, and right."""
    sized = Given("plain", given.generator) if given.setting == "huge" else given
    images, weight = sized.features(given.rows, D), torch.randn(D, C, generator=given.generator)
    weight *= 20 if given.setting == "huge" else 1
    answers = (images.float() @ weight).argmax(1)
    return {
        "images": images, "weight": weight, "labels": answers if given.setting == "huge" else given.labels(given.rows),
    }  # fmt: skip


def several_classes(given: Given) -> Tensor:
    """``[B, C]`` of 0 and 1; ``lonely``: an image has none, another one has all."""
    targets = (torch.rand(given.rows, C, generator=given.generator) < 0.4).long()
    if given.setting == "lonely":
        targets[0], targets[1] = 0, 1
    return targets


ONCE = (1.0,)  # no temperature
EQUATIONS: dict[str, Equation] = {
    "ntxent.ntxent": Equation(
        lambda g: two(g, g.rows, D), lambda z1, z2, T: ntxent.ntxent(z1, z2, temperature=T), exactly.ntxent,
        ("z1", "z2"),
    ),
    "ntxent.ntxent in chunks with a memory": Equation(
        lambda g: two(g, g.rows, D) | {"memory": g.unit(3, D)},
        lambda z1, z2, memory, T: ntxent.ntxent(z1, z2, temperature=T, memory=memory, chunk_size=2), exactly.ntxent,
        ("z1", "z2"),
    ),
    "ntxent.unit": Equation(
        lambda g: {"z": g.features(g.rows, D)}, lambda z, T: ntxent.unit(z.float()),
        lambda z, T: exactly.unit(z, "1e-6"), temperatures=ONCE,
    ),
    "ntxent.cross_view_logits": Equation(
        lambda g: two(g, g.rows, D), lambda z1, z2, T: ntxent.cross_view_logits(z1, z2, temperature=T)[0],
        lambda z1, z2, T: exactly.unit(z1, "1e-6") @ exactly.unit(z2, "1e-6").T / T,
    ),
    "ntxent.contrast_entropy": Equation(
        lambda g: {"logits": g.logits(g.rows, C).float()}, lambda logits, T: ntxent.contrast_entropy(logits / T),
        lambda logits, T: exactly.mean(
            -(exactly.softmax(logits / T) * exactly.log(exactly.softmax(logits / T) + mpmath.mpf("1e-8"))).sum(1)
        ),
    ),
    "distillation.distillation": Equation(
        lambda g: {"student": g.logits(g.rows, C), "teacher": g.logits(g.rows, C)},
        lambda student, teacher, T: distillation.distillation(student, teacher, temperature=T, tau2=False),
        lambda student, teacher, T: exactly.mean(
            exactly.cross_entropy(exactly.softmax(teacher / T), student / T)
        ),
        ("student",),
    ),
    "distillation.distillation times the temperature's square": Equation(
        lambda g: {"student": g.logits(g.rows, C), "teacher": g.logits(g.rows, C)},
        lambda student, teacher, T: distillation.distillation(student, teacher, temperature=T, tau2=True) / T**2,
        lambda student, teacher, T: exactly.mean(
            exactly.cross_entropy(exactly.softmax(teacher / T), student / T)
        ),
        ("student",),
    ),
    "feature_distillation.cosine_distance": Equation(
        lambda g: two(g, g.rows, D, names=("student", "teacher")),
        lambda student, teacher, T: feature_distillation.cosine_distance(student, teacher),
        lambda student, teacher, T: 1 - exactly.mean(
            (exactly.unit(student, "1e-8") * exactly.unit(teacher, "1e-8")).sum(1)
        ),
        ("student",), ONCE,
    ),
    "feature_distillation.similarity_distillation": Equation(
        lambda g: {**two(g, g.rows, D, names=("student", "teacher")), "queue": g.unit(K, D)},
        lambda student, teacher, queue, T: feature_distillation.similarity_distillation(
            student, teacher, queue, student_temperature=T, teacher_temperature=T
        ),
        lambda student, teacher, queue, T: exactly.mean(
            exactly.cross_entropy(
                exactly.softmax(similar(exactly.unit(teacher), teacher, queue) / T),
                similar(exactly.unit(student), teacher, queue) / T,
            )
        ),
        ("student",),
    ),
    "distillation.distillation_with_labels": Equation(
        partly_labelled,
        lambda student, teacher, labels, T: distillation.distillation_with_labels(
            student, teacher, labels, temperature=T, alpha=0.25
        ),
        exact_distillation_with_labels, ("student",),
    ),
    "rotation.rotation_loss": Equation(
        lambda g: {"logits": g.logits(4 * g.rows, 4), "labels": torch.arange(4).repeat(g.rows)},
        lambda logits, labels, T: rotation.rotation_loss(logits, labels),
        lambda logits, labels, T: exactly.mean(exactly.cross_entropy(exactly.one_hot(labels, 4), logits)),
        ("logits",), ONCE,
    ),
    "rotation.rotation_loss_per_image": Equation(
        lambda g: {"logits": g.logits(4 * g.rows, 4), "labels": torch.arange(4).repeat(g.rows)},
        lambda logits, labels, T: rotation.rotation_loss_per_image(logits, labels),
        lambda logits, labels, T: exactly.cross_entropy(exactly.one_hot(labels, 4), logits).reshape(-1, 4).sum(1) / 4,
        temperatures=ONCE,
    ),
    "mixing.soft_cross_entropy": Equation(
        lambda g: {"logits": g.logits(g.rows, C), "targets": g.probabilities(g.rows, C)},
        lambda logits, targets, T: mixing.soft_cross_entropy(logits, targets),
        lambda logits, targets, T: exactly.mean(exactly.cross_entropy(targets, logits)), ("logits",), ONCE,
    ),
    "mixing.soft_binary_cross_entropy": Equation(
        lambda g: {"logits": g.logits(g.rows, C), "targets": g.probabilities(g.rows, C)},
        lambda logits, targets, T: mixing.soft_binary_cross_entropy(logits, targets),
        lambda logits, targets, T: exactly.mean(
            targets * exactly.log(1 + exactly.exp(-logits)) + (1 - targets) * exactly.log(1 + exactly.exp(logits))
        ),
        ("logits",), ONCE,
    ),
    "swav.sinkhorn": Equation(
        lambda g: {"scores": g.unit(g.rows, D) @ g.unit(K, D).T * (0 if g.setting == "zero" else 1)},
        lambda scores, T: swav.sinkhorn(scores, epsilon=T, iterations=3),
        lambda scores, T: exactly.sinkhorn(scores, T, 3),
    ),
    "swav.swapped_prediction": Equation(
        lambda g: {"scores": g.features(3, g.rows, K), "codes": g.probabilities(2, g.rows, K)},
        lambda scores, codes, T: swav.swapped_prediction(scores, codes, (0, 2), temperature=T),
        lambda scores, codes, T: exactly.swapped_prediction(scores, codes, (0, 2), T), ("scores",),
    ),
    "deepclusterv2.cluster_prediction": Equation(
        clusters,
        lambda scores, clusters, T: deepclusterv2.cluster_prediction([scores], clusters[None], temperature=T),
        exact_clusters, ("scores",),
    ),
    "deepclusterv2.spherical_kmeans": Equation(
        lambda g: {"x": g.unit(g.rows, D), "centroids": g.unit(3, D)},
        lambda x, centroids, T: deepclusterv2.spherical_kmeans(x, centroids, 1)[0],
        lambda x, centroids, T: exactly.spherical_kmeans(x, centroids), temperatures=ONCE,
    ),
    "pixpro.pixel_consistency": Equation(
        maps, sphere(lambda q, k, A, T: pixpro.pixel_consistency(q, k, A), "q", "k", dim=1),
        lambda q, k, A, T: exactly.pixel_consistency(q, k, A), ("q", "k"), ONCE,
    ),
    "pixpro.pixel_contrast": Equation(
        maps, sphere(lambda q, k, A, T: pixpro.pixel_contrast(q, k, A, temperature=T), "q", "k", dim=1),
        exactly.pixel_contrast, ("q", "k"),
    ),
    "pixpro.instance_consistency": Equation(
        lambda g: two(g, g.rows, D), sphere(lambda z1, z2, T: pixpro.instance_consistency(z1, z2), "z1", "z2"),
        lambda z1, z2, T: -2 * exactly.mean((exactly.unit(z1) * exactly.unit(z2)).sum(1)), ("z1", "z2"), ONCE,
    ),
    "pixpro's propagation": Equation(
        lambda g: {"x": g.features(g.rows, D, 2, 2)},
        lambda x, T: PixelPropagation(D, exponent=2, clamp=0.0, layers=0).propagate(x, x),
        lambda x, T: exactly.propagate(x, x, 2), temperatures=ONCE,
    ),
    "spark.masked_patch_loss": Equation(
        images, lambda reconstruction, images, active, T: spark.masked_patch_loss(reconstruction, images, active),
        lambda reconstruction, images, active, T: exactly.masked_patch_loss(reconstruction, images, active, 4),
        ("reconstruction",), ONCE,
    ),
    "semi.cross_entropy": Equation(
        lambda g: {"logits": g.logits(g.rows, C), "y": g.probabilities(g.rows, C), "mask": chosen(g, g.rows)},
        lambda logits, y, mask, T: semi.cross_entropy(logits, y, mask),
        lambda logits, y, mask, T: exactly.mean(mask * exactly.cross_entropy(y, logits)), ("logits",), ONCE,
    ),
    "semi.squared_error": Equation(
        lambda g: {"logits": g.logits(g.rows, C), "y": g.probabilities(g.rows, C), "mask": chosen(g, g.rows)},
        lambda logits, y, mask, T: semi.squared_error(logits, y, mask),
        lambda logits, y, mask, T: exactly.mean(mask * ((exactly.softmax(logits) - y) ** 2).sum(1) / C),
        ("logits",), ONCE,
    ),
    "semi.sharpen": Equation(
        lambda g: {"p": g.probabilities(g.rows, C)}, lambda p, T: semi.sharpen(p, T),
        lambda p, T: exactly.norm(np.where(p > 0, np.maximum(p, mpmath.mpf(10) ** -60) ** (1 / mpmath.mpf(T)), p)),
    ),
    "semi.fairness": Equation(
        fair, lambda logits, mask, p_model, histogram, T: semi.fairness(logits, mask, p_model, histogram),
        lambda logits, mask, p_model, histogram, T: exactly.fairness(logits, mask, p_model, histogram),
        ("logits",), ONCE,
    ),
    "semi.pseudo_label_graph": Equation(
        lambda g: {"p": g.probabilities(g.rows, C)}, lambda p, T: semi.pseudo_label_graph(p, 0.3),
        lambda p, T: exactly.pseudo_label_graph(p, 0.3), temperatures=ONCE,
    ),
    "semi.graph_contrast": Equation(
        lambda g: two(g, g.rows, D) | {"graph": g.probabilities(g.rows, g.rows)},
        sphere(lambda z1, z2, graph, T: semi.graph_contrast(z1, z2, graph, T), "z1", "z2"),
        lambda z1, z2, graph, T: exactly.graph_contrast(z1, z2, graph, T), ("z1", "z2"),
    ),
    "semi.gaussian_weights": Equation(
        confidences,
        lambda confidence, mean, variance, T: semi.gaussian_weights(confidence, mean, variance, 1 / T),
        exact_weights, temperatures=(0.1, 1.0, 10.0),
    ),
    "semi.similarity": Equation(
        lambda g: {"z": g.features(g.rows, D), "bank": g.features(K, D)},
        sphere(lambda z, bank, T: semi.similarity(z, bank, T), "z", "bank"),
        lambda z, bank, T: exactly.softmax(exactly.unit(z) @ exactly.unit(bank).T / T),
    ),
    "semi.log_similarity": Equation(
        lambda g: {"z": g.features(g.rows, D), "bank": g.features(K, D)},
        sphere(lambda z, bank, T: semi.log_similarity(z, bank, T), "z", "bank"),
        lambda z, bank, T: exactly.log(exactly.softmax(exactly.unit(z) @ exactly.unit(bank).T / T)),
    ),
    "semi.smoothed": Equation(
        lambda g: neighbours(g) | {"labels": g.probabilities(K, C)},
        sphere(lambda z, bank, p, labels, T: semi.smoothed(p, z, bank, labels, T, 0.75), "z", "bank"),
        lambda z, bank, p, labels, T: mpmath.mpf(0.75) * p
        + mpmath.mpf(0.25) * exactly.softmax(exactly.unit(z) @ exactly.unit(bank).T / T) @ labels,
    ),
    "semi.unfold_log": Equation(
        neighbours,
        sphere(
            lambda z, bank, p, labels, T: semi.unfold_log(semi.log_similarity(z, bank, T), p, labels), "z", "bank"
        ),
        lambda z, bank, p, labels, T: exactly.unfold(z, bank, p, labels, T),
    ),
    "semi.unfold": Equation(
        neighbours,
        sphere(lambda z, bank, p, labels, T: semi.unfold(semi.similarity(z, bank, T), p, labels), "z", "bank"),
        lambda z, bank, p, labels, T: exactly.unfold(z, bank, p, labels, T), temperatures=(0.1, 1e4),
    ),
    "semi.aggregate": Equation(
        lambda g: neighbours(g) | {"edges": g.probabilities(g.rows, K)},
        lambda z, bank, p, labels, edges, T: semi.aggregate(edges, p, labels, 0.75),
        lambda z, bank, p, labels, edges, T: exactly.aggregate(edges, p, labels, mpmath.mpf(0.75)), temperatures=ONCE,
    ),
    "semi.instance_consistency": Equation(
        lambda g: {"z": g.features(g.rows, D), "bank": g.unit(K, D), "targets": g.probabilities(g.rows, K)},
        sphere(lambda z, bank, targets, T: semi.instance_consistency(z, bank, targets, T).mean(), "z"),
        lambda z, bank, targets, T: exactly.mean(exactly.cross_entropy(targets, exactly.unit(z) @ bank.T / T)), ("z",),
    ),
    "simmatchv2.align": Equation(
        lambda g: {"q": g.probabilities(g.rows, C), "running": g.probabilities(C) * torch.tensor([1, 1e-37, 1, 1])},
        lambda q, running, T: simmatchv2.align(q, running),
        # a mean that is zero in float32 counts as the smallest number, so that 0 / 0 is 0
        lambda q, running, T: exactly.norm(q / np.maximum(running, mpmath.mpf(torch.finfo(torch.float32).tiny))),
        temperatures=ONCE,
    ),
    "simmatchv2.log_edges": Equation(
        lambda g: {"z": g.features(g.rows, D), "bank": g.features(K, D)},
        sphere(lambda z, bank, T: simmatchv2.log_edges(z, bank, T), "z", "bank"),
        lambda z, bank, T: exactly.log(exactly.softmax(exactly.unit(z) @ exactly.unit(bank).T / T)),
    ),
    "simmatchv2.graph": Equation(
        lambda g: {"nodes": g.features(g.rows, 4, D)},
        sphere(lambda nodes, T: simmatchv2.graph(nodes, T), "nodes"), exactly.graph,
    ),
    "simmatchv2.refine": Equation(
        neighbours,
        sphere(
            lambda z, bank, p, labels, T: simmatchv2.refine(
                z, p, bank, labels, n=3 if z.any() else K, t=T, alpha=0.5
            ), "z", "bank"
        ),
        lambda z, bank, p, labels, T: exactly.refine(
            z, p, bank, labels, T, 3 if z.any() else K, mpmath.mpf(0.5)
        ),
    ),
    "simmatchv2.node_node": Equation(
        lambda g: {"logits": g.logits(2, g.rows, C), "r": g.probabilities(g.rows, C), "mask": chosen(g, g.rows)},
        lambda logits, r, mask, T: simmatchv2.node_node(logits, r, mask),
        lambda logits, r, mask, T: exactly.mean(mask * exactly.cross_entropy(r, logits)), ("logits",), ONCE,
    ),
    "simmatchv2.edge_edge": Equation(
        edges,
        sphere(
            lambda student, bank, teacher, T: simmatchv2.edge_edge(simmatchv2.log_edges(student, bank, T), teacher),
            "student",
        ),
        lambda student, bank, teacher, T: exactly.mean(
            exactly.cross_entropy(teacher, exactly.unit(student) @ bank.T / T)
        ),
        ("student",),
    ),
    "simmatchv2.node_edge": Equation(
        lambda g: {
            "student": g.features(2, g.rows, D), "bank": g.unit(K, D), "p": g.probabilities(g.rows, C),
            "u_labels": 0.9 * g.probabilities(K, C) + 0.1 / C,
        },
        sphere(
            lambda student, bank, p, u_labels, T: simmatchv2.node_edge(
                simmatchv2.log_edges(student, bank, T), p, u_labels
            ),
            "student",
        ),
        lambda student, bank, p, u_labels, T: exactly.node_edge(student, bank, p, u_labels, T), ("student",),
    ),
    "byol.byol": Equation(
        four, lambda T, **p: byol.byol(**p),
        lambda T, p1, p2, z1, z2: sum(
            exactly.mean(((exactly.unit(p, "1e-6") - exactly.unit(z, "1e-6")) ** 2).sum(1))
            for p, z in ((p1, z2), (p2, z1))
        ),
        ("p1", "p2"), ONCE,
    ),
    "simsiam.simsiam": Equation(
        four, lambda T, **p: simsiam.simsiam(**p),
        lambda T, p1, p2, z1, z2: -sum(
            exactly.mean((exactly.unit(p, "1e-8") * exactly.unit(z, "1e-8")).sum(1)) for p, z in ((p1, z2), (p2, z1))
        ) / 2,
        ("p1", "p2"), ONCE,
    ),
    "mocov3.contrast": Equation(
        lambda g: two(g, g.rows, D, names=("q", "k")),
        lambda q, k, T: mocov3.contrast(q, k, temperature=T) / (2 * T),
        lambda q, k, T: exactly.mean(
            exactly.cross_entropy(np.eye(len(q), dtype=object), exactly.unit(q) @ exactly.unit(k).T / T)
        ),
    ),
    "clip.pair_contrast": Equation(
        lambda g: two(g, g.rows, D), lambda z1, z2, T: clip.pair_contrast(z1, z2, scale=1 / T),
        lambda z1, z2, T: sum(
            exactly.mean(exactly.cross_entropy(np.eye(len(a), dtype=object), exactly.unit(a) @ exactly.unit(b).T / T))
            for a, b in ((z1, z2), (z2, z1))
        ) / 2,
    ),
    "dino.dino": Equation(
        crops,
        lambda student, teacher, centre, T: dino.dino(
            student, dino.centred_softmax(teacher, centre, temperature=T / 2), temperature=T
        ),
        exact_dino,
    ),
    "barlow.barlow_twins": Equation(
        columns, lambda z1, z2, T: sum(barlow.barlow_twins(z1, z2)[:2]), exact_barlow, ("z1", "z2"), ONCE
    ),
    "vicreg.vicreg": Equation(columns, lambda z1, z2, T: sum(vicreg.vicreg(z1, z2)), exact_vicreg, ("z1", "z2"), ONCE),
    "mae.masked_pixels": Equation(
        images,
        lambda reconstruction, images, active, T: mae.masked_pixels(
            patchify(reconstruction.float(), 4), images, ~active.flatten(1)
        ),
        lambda reconstruction, images, active, T: exactly.masked_patch_loss(reconstruction, images, active, 4),
        ("reconstruction",), ONCE,
    ),
    "cotraining.agreement": Equation(
        lambda g: {name: g.logits(g.rows, C) for name in ("f", "g")}, lambda f, g, T: cotraining.agreement(f, g),
        lambda f, g, T: exactly.mean(exactly.jensen_shannon(exactly.softmax(f), exactly.softmax(g))),
        ("f", "g"), ONCE,
    ),
    "cotraining.difference": Equation(
        lambda g: {name: g.logits(g.rows, C) for name in ("f", "g", "f_on_g", "g_on_f")},
        lambda T, **logits: cotraining.difference(**logits),
        lambda T, f, g, f_on_g, g_on_f: exactly.mean(exactly.cross_entropy(exactly.softmax(g), f_on_g))
        + exactly.mean(exactly.cross_entropy(exactly.softmax(f), g_on_f)),
        ("f", "g", "f_on_g", "g_on_f"), ONCE,
    ),
    "cotraining.adversarial": Equation(
        fooled,
        lambda images, weight, labels, T: cotraining.adversarial(lambda x: x @ weight, images.float(), labels, 0.1),
        lambda images, weight, labels, T: exactly.adversarial(images, weight, labels, mpmath.mpf(0.1)),
        temperatures=ONCE,
    ),
    "mcl.cluster_ntxent": Equation(
        lambda g: two(g, g.rows, D) | {"clusters": g.labels(g.rows)},
        sphere(lambda z1, z2, clusters, T: mcl.cluster_ntxent(z1, z2, clusters, temperature=T), "z1", "z2"),
        exactly.cluster_ntxent,
    ),
    "mcl.cluster_ntxent averaged": Equation(
        lambda g: two(g, g.rows, D) | {"clusters": g.labels(g.rows)},
        sphere(lambda z1, z2, clusters, T: mcl.cluster_ntxent(z1, z2, clusters, temperature=T).mean(), "z1", "z2"),
        lambda **given: exactly.mean(exactly.cluster_ntxent(**given)), ("z1", "z2"),
    ),
    "mcl.concatenated": Equation(
        lambda g: {"features": g.features(3, g.rows, D)}, lambda features, T: mcl.concatenated(features),
        lambda features, T: exactly.unit(np.concatenate(list(features), 1)), temperatures=ONCE,
    ),
    "multilabel.weighted_binary_cross_entropy": Equation(
        lambda g: {"logits": g.logits(g.rows, C), "targets": several_classes(g)},
        lambda logits, targets, T: multilabel.weighted_binary_cross_entropy(logits, targets),
        lambda logits, targets, T: exactly.weighted_binary_cross_entropy(logits, targets), ("logits",), ONCE,
    ),
}  # fmt: skip
for summation in contrast.SUMMATIONS:
    for denominator in contrast.DENOMINATORS:
        options = {"summation": summation, "denominator": denominator}

        def ours(f: Tensor, y: Tensor, T: float, options: dict[str, Any]) -> Tensor:
            rows = normalise(f.float(), dim=-1)
            return contrast.supcon(rows, y, temperature=T, base_temperature=None, **options)

        EQUATIONS[f"supcon.supcon {summation} {denominator}"] = Equation(
            lambda g: {"f": g.features(g.rows, 2, D), "y": g.labels(g.rows)},
            partial(ours, options=options),
            lambda f, y, T, options=options: exactly.supcon(f, y, T, **options),
            ("f",),
        )
#: no losses: pictures, geometry, mixtures, indices, shares of right answers; and what is a part of one above
OTHERS = {
    "byol": {"distances"},
    "dino": {"centred_softmax", "next_centre"},
    "lejepa": {"lejepa", "sigreg", "epps_pulley", "random_directions", "unit_columns"},  # test_redundancy
    "mae": {"filled", "patch_size"},
    "multilabel": {"multi_hot"},
    "logit_adjustment": {"adjusted", "log_shares"},
    "matryoshka": {"over_prefixes", "matryoshka", "weighted_sum"},  # sums of the losses above
    "mixing": {"even_batch", "mixup", "cutmix_box", "cutmix", "mixed_targets"},
    "ntxent": {"contrast_accuracy"},
    "pixpro": {"pixel_distances", "positives"},
    "semi": {"mix_up", "guess", "interleave"},
    "simmatchv2": {"propagation", "neighbourhood"},
    "spark": {"patchify", "unpatchify", "patch_statistics", "fill_hidden"},
    "supcon": {"by_image", "supcon_per_anchor", "equation_2", "equation_3", "log_denominator"},
}  # fmt: skip


def test_no_loss_is_left_out() -> None:
    tested = {name.split(" ")[0] for name in EQUATIONS}
    for module in pkgutil.iter_modules(selfsight.losses.__path__):
        file = importlib.import_module(f"selfsight.losses.{module.name}")
        for name, function in inspect.getmembers(file, inspect.isfunction):
            if function.__module__ == file.__name__ and not name.startswith("_"):
                known = f"{module.name}.{name}" in tested or name in OTHERS.get(module.name, ())
                assert known, f"{module.name}.{name}"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_extremes(name: str, setting: str) -> None:
    equation = EQUATIONS[name]
    for temperature in equation.temperatures:
        given = Given(setting, torch.Generator().manual_seed(zlib.crc32(f"{name} {temperature}".encode())))
        tensors = equation.draw(given)
        for trained in equation.trained:
            tensors[trained].requires_grad_()
        arrays = {key: exactly.exact(t) for key, t in tensors.items()}
        got = equation.ours(T=temperature, **tensors)
        expected = partial(equation.exact, T=mpmath.mpf(temperature))
        # what is divided by the temperature is rounded before, and the exponential makes that a relative error
        rounding = 4 * EPSILON * max(1.0, 1 / temperature if equation.temperatures != ONCE else 0.0)
        want = np.asarray(expected(**arrays), dtype=object)
        place = f"{name}, {setting}, temperature {temperature:g}"
        assert got.shape == want.shape, place
        close(got, want, 3e-6, rounding, place)
        if equation.trained and got.requires_grad:
            check_slope(got, tensors, arrays, expected, equation.trained, rounding, place)


def check_slope(
    got: Tensor,
    tensors: dict[str, Tensor],
    arrays: dict[str, Any],
    expected: partial[Any],
    trained: tuple[str, ...],
    rounding: float,
    place: str,
) -> None:
    """The gradient along a random direction, as long as the features are."""
    generator = torch.Generator().manual_seed(1)
    direction = {
        n: torch.randn(tensors[n].shape, generator=generator, dtype=torch.float64)
        * max(1.0, float(tensors[n].detach().double().abs().max()))
        for n in trained
    }
    gradients = torch.autograd.grad(got, [tensors[n] for n in trained])
    along = sum((g.double() * direction[n]).sum() for n, g in zip(trained, gradients, strict=True))
    size = sum(float((g.double() * direction[n]).abs().sum()) for n, g in zip(trained, gradients, strict=True))
    want = exactly.slope(expected, arrays, {n: exactly.exact(d) for n, d in direction.items()})
    # a gradient is a difference of probabilities, rounded in the type of what it flows to; its unit is 1 / temperature
    length = sum(float(d.abs().sum()) for d in direction.values())
    half = any(tensors[n].dtype == torch.float16 for n in trained)
    relative = 1e-5 + 20 * rounding + (2e-3 if half else 0)
    absolute = 4 * EPSILON / float(expected.keywords["T"]) + (6e-8 * length if half else 0)
    tolerance = relative * max(size, float(abs(want))) + absolute
    error = float(abs(mpmath.mpf(float(along)) - want))
    assert error <= tolerance, f"{place}: slope {float(along):.6g}, exactly {mpmath.nstr(want, 8)}"


def close(got: Tensor, want: Any, relative: float, absolute: float, place: str) -> None:
    for ours, exact in zip(got.detach().double().flatten().tolist(), want.flatten(), strict=True):
        error = float(abs(mpmath.mpf(ours) - exact))
        assert error <= relative * float(abs(exact)) + absolute, (
            f"{place}: {ours:.8g}, exactly {mpmath.nstr(exact, 10)}"
        )
