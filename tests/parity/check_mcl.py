"""The numbers of multistage contrastive learning (MajorDavidZhang/MCL); ``masked_`` by the formula."""

from __future__ import annotations

import torch

from selfsight.datamodules.loading.clusters import cluster_batches, pseudo_labels
from selfsight.losses.clip import pair_contrast
from selfsight.losses.mcl import cluster_ntxent, concatenated

from .harness import Case, family
from .networks import gradients

TOLERANCE = 1e-9


@family("mcl", "sampler_")
def sampler(case: Case) -> None:
    W, B = case.number("world_size"), case.number("batch_size")
    orders = [row[row >= 0] for row in case.tensor("permutation")]
    batches = [cluster_batches(case.tensor("pseudo_label"), orders, B, rank, W) for rank in range(W)]
    case.compare("batches", torch.stack(batches), 0)
    case.compare("length", len(batches[0]), 0)


@family("mcl", "pseudo_")
def crossed(case: Case) -> None:
    case.compare("pseudo_label", pseudo_labels(case.tensor("cluster"), case.number("num_clusters")), 0)
    case.informative("as_released")


@family("mcl", "cliploss_")
def stage_loss(case: Case) -> None:
    z = {name: case.tensor(name, requires_grad=True) for name in ("image", "text")}
    value = pair_contrast(*z.values(), scale=case.number("logit_scale"), normalize=False)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    for name, gradient in gradients(z).items():
        case.compare(name, gradient, TOLERANCE)


@family("mcl", "masked_")
def within_clusters(case: Case) -> None:
    z = {name: case.tensor(name, requires_grad=True) for name in ("z1", "z2")}
    per_anchor = cluster_ntxent(*z.values(), case.tensor("pseudo_label"), temperature=case.number("temperature"))
    per_anchor.mean().backward()
    case.compare("per_anchor", per_anchor, TOLERANCE)
    case.compare("loss", per_anchor.mean(), TOLERANCE)
    for name, gradient in gradients(z).items():
        case.compare(name, gradient, TOLERANCE)


@family("mcl", "concat_")
def stages(case: Case) -> None:
    case.compare("representation", concatenated(case.tensor("features")), TOLERANCE)
