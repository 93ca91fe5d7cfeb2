"""How alike two embeddings of the same images are."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.knn import other_neighbours
from selfsight.nn.sphere import directions


def compare(a: Features, b: Features, k: int = 10) -> dict[str, float]:
    """``cka`` and ``neighbour_overlap`` (of the ``k`` nearest) over the images both sets have.

    The dimensions may differ. Raises UserError with fewer than k + 2 images in common.
    """
    a, b = common(a, b)
    if len(a) < k + 2:
        raise UserError(
            f"The two sets share {len(a)} images, and comparing {k} neighbours takes {k + 2}: use the same data."
        )
    return {"cka": linear_cka(a.x, b.x), "neighbour_overlap": neighbour_overlap(a.x, b.x, k)}


def common(a: Features, b: Features) -> tuple[Features, Features]:
    """The images both have, by index, in the same order."""
    both = sorted(set(a.indices.tolist()) & set(b.indices.tolist()))
    taken = []
    for features in (a, b):
        place = {index: row for row, index in enumerate(features.indices.tolist())}
        taken.append(features.take(torch.tensor([place[index] for index in both], dtype=torch.int64)))
    return taken[0], taken[1]


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of ``[N, D]`` and ``[N, E]`` (Kornblith et al. 2019, eq. 6 ff.).

    1 for embeddings equal up to rotation and scale, near 0 for unrelated ones (given N well above D and E).
    """
    a, b = ((x.double() - x.double().mean(dim=0)) for x in (a, b))
    own = torch.linalg.matrix_norm(a.T @ a) * torch.linalg.matrix_norm(b.T @ b)
    return float((a.T @ b).square().sum() / own) if own > 0 else 0.0


def neighbour_overlap(a: Tensor, b: Tensor, k: int) -> float:
    """Mean share of an image's ``k`` nearest others by cosine that are the same in both embeddings."""
    lists = []
    for x in (a, b):
        unit = directions(x.float())
        lists.append(other_neighbours(unit, unit, k)[1])
    return float((lists[0][:, :, None] == lists[1][:, None, :]).any(dim=2).double().mean())
