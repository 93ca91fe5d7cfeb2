"""Which images of a data set are kept: how hard each is, and the choice by the options of `selfsight prune`."""

from __future__ import annotations

import torch

from selfsight.datamodules import ImageData
from selfsight.engine.about_data import readable
from selfsight.engine.options import PruneOptions
from selfsight.errors import UserError
from selfsight.evaluation import Features
from selfsight.evaluation.pruning import Prototypes, choose, default_prototypes, prototype_scores


def scored(features: Features, options: PruneOptions, data: ImageData) -> Prototypes:
    """How far each image is from its prototype.

    Raises:
        UserError: there are no images, or fewer than prototypes.
    """
    images = len(features)
    if not images:
        raise UserError(f"'{data.name}' has no image to learn from that can be read, and so none to keep.")
    if (options.prototypes or 1) > images:
        raise UserError(f"prototypes is {options.prototypes}, and there are {images:,} images; choose at most as many.")
    count = options.prototypes or default_prototypes(images, data.num_classes)
    drawn = torch.randperm(images, generator=torch.Generator().manual_seed(options.seed))
    return prototype_scores(features.in_memory().x, drawn[:count], iterations=options.iterations)


def chosen(found: Prototypes, features: Features, options: PruneOptions, data: ImageData) -> torch.Tensor:
    """``[N]`` bool, the images to keep.

    Raises:
        UserError: nothing to learn from is left, a class would be empty, or classes are to be balanced without labels.
    """
    labels, classes = features.labels, data.num_classes
    if options.balance and (labels is None or not classes):
        raise UserError(
            f"balance is {options.balance:g}, and the images of '{data.name}' have no classes to balance; leave it out."
        )
    rows = choose(
        found.score,
        options.keep,
        hard=options.rule == "hard",
        labels=labels,
        classes=classes,
        balance=options.balance,
        names=[readable(name) for name in data.classes],
    )
    if len(rows) < 2:
        raise UserError(
            f"keep {options.keep:g} of {len(features):,} images is {len(rows)}, and a method learns from two at least; "
            "keep more."
        )
    kept = torch.zeros(len(features), dtype=torch.bool)
    kept[rows] = True
    return kept
