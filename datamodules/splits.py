"""Which images keep their labels, and which are held out: one function per published rule."""

from __future__ import annotations

import torch
from selfsight.errors import UserError
from torch import Tensor


def allocate(counts: Tensor, total: int) -> Tensor:
    """``total`` shared out in proportion to ``counts [C]``, whole numbers, largest remainders first."""
    exact = counts.double() * total / counts.sum()
    share = exact.floor().long()
    missing = total - int(share.sum())
    order = torch.argsort(exact - share, descending=True, stable=True)
    share[order[:missing]] += 1
    return share


def hold_out(labels: Tensor | None, images: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the held-out images, each in ascending order; by class in proportion when labelled.

    ``ceil(fraction * images)`` images are held out.

    Raises:
        UserError: a fraction that leaves nothing on one side.
    """
    total = -int(-fraction * images // 1)
    if not 0 < fraction < 1 or not 0 < total < images:
        raise UserError(
            f"test_fraction is {fraction} of {images} images; it has to lie between 0 and 1 and leave some on both sides."
        )
    generator = torch.Generator().manual_seed(seed)
    classes = torch.zeros(images, dtype=torch.int64) if labels is None else labels
    names, counts = classes.unique(return_counts=True)
    chosen = []
    for label, count in zip(names.tolist(), allocate(counts, total).tolist(), strict=True):
        members = (classes == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    held = torch.cat(chosen).sort().values
    kept = torch.ones(images, dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held
