"""Numbers on frozen features, and the table at the end of a run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.datamodules import ArrayImages, DataModule, ImageDataModule, ImageSet
from selfsight.datamodules.images.sets import JoinedImages
from selfsight.errors import UserError
from selfsight.evaluation.base import (
    Evaluator,
    FeatureEvaluator,
    Figures,
    looks_at_images,
    needs_labels,
    protocol,
    takes_targets,
)
from selfsight.evaluation.cache import FeatureCache
from selfsight.evaluation.features import FINAL, Features, extract, missing_labels
from selfsight.evaluation.probes import balance, classification
from selfsight.evaluation.probes.targets import MAIN
from selfsight.evaluation.views import plain_view
from selfsight.files import write_text
from selfsight.methods.base import Method
from selfsight.runs.folder import RunFolder

#: features of training and test images; the latter None where there are none
Pair = tuple[Features, Features | None]

LAST = 20  #: evaluations whose median is reported


def features(backbone: nn.Module, data: DataModule, stage: str = "final") -> Pair:
    """Train and test features of a backbone, from un-augmented images; None for test images that there are none of."""
    return staged_features(backbone, data, [stage])[stage]


def staged_features(
    backbone: nn.Module,
    data: DataModule,
    stages: list[str],
    *,
    head: nn.Module | None = None,
    cache: Path | None = None,
) -> dict[str, Pair]:
    """Train and test features by stage, from one pass over the images, or from the folder ``cache`` where they lie."""
    there = available_splits(data)
    train, test = (
        part_features(backbone, data, split, stages, head=head, cache=cache) if split in there else None
        for split in ("train", "test")
    )
    assert train is not None, "a data set has images to learn from"
    return {stage: (train[stage], None if test is None else test[stage]) for stage in stages}


def part_features(
    backbone: nn.Module,
    data: DataModule,
    split: str,
    stages: list[str],
    *,
    head: nn.Module | None = None,
    cache: Path | None = None,
) -> dict[str, Features]:
    """Features by stage of one part of the data: ``train``, ``test`` or ``unlabelled``."""
    found: dict[str, Features]
    if cache is None:
        images = len(data.data.split(split))
        found = extract(backbone, data.eval_dataloader(split), stages=stages, head=head, images=images)
    else:
        kept = FeatureCache(cache)
        found = kept.extract(backbone, data, split, stages=stages, head=head)
    return found


def learnt_from(
    backbone: nn.Module,
    data: DataModule,
    stage: str = FINAL,
    *,
    head: nn.Module | None = None,
    cache: Path | None = None,
) -> tuple[Features, ImageSet]:
    """Features of all images one may learn from, labelled or not, and these images, in which ``indices`` count."""
    splits = [split for split in available_splits(data) if split != "test"]
    found = [part_features(backbone, data, split, [stage], head=head, cache=cache)[stage] for split in splits]
    if len(found) == 1:
        return found[0], data.data.split(splits[0])
    first, further = found
    features = replace(
        first,
        x=torch.cat([first.x, further.x]),
        labels=None if first.labels is None else torch.cat([first.labels, torch.full((len(further),), -1)]),
        indices=torch.cat([first.indices, further.indices + len(data.data.train)]),
    )
    return features, JoinedImages([data.data.split(split) for split in splits])


def feature_of_image(backbone: nn.Module, data: DataModule, image: np.ndarray) -> Tensor:
    """Features ``[D]`` of an image ``[H, W, 3]`` uint8, presented as evaluation does."""
    one = ArrayImages(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    module = ImageDataModule(
        replace(data.data, train=one, test=one, unlabelled=None, classes=()),
        [plain_view(data)],
        batch_size=1, num_workers=0, engine="auto", seed=0, device="cpu",
    )  # fmt: skip
    features: Tensor = extract(backbone, module.eval_dataloader("test"))["final"].x[0]
    return features


def available_splits(data: DataModule) -> list[str]:
    """The parts of a data set that hold images."""
    return [split for split in ("train", "unlabelled", "test") if len(getattr(data.data, split) or ())]


def missing_labels_reason(data: DataModule, evaluator: Evaluator | None = None) -> str:
    """What keeps accuracies from being measured, in a few words: labels or test images. Empty where nothing does.

    Args:
        evaluator: that is to measure; None: any that is content with whatever labels there are.
    """
    reason: str = missing_labels(data.data, targets=evaluator is None or takes_targets(evaluator))
    return reason


def check_labels(evaluator: Evaluator, data: DataModule) -> None:
    """Refuse an evaluator that needs labels on data without.

    Raises:
        UserError: naming what is lacking.
    """
    if needs_labels(evaluator) and (reason := missing_labels_reason(data, evaluator)):
        raise UserError(
            f"{type(evaluator).__name__} compares with the labels of test images, and {reason}: give another data set "
            "(dataset=NAME), or take figures that need no labels (selfsight diagnostics)."
        )


def select_evaluators(evaluators: Mapping[str, Evaluator], data: DataModule) -> dict[str, Evaluator]:
    """Evaluators of the table: without labels those that need none; with labels those that features are enough for.

    Of several labels or numbers in place of classes: those of them that are content with these, or need no labels.
    """
    if missing_labels_reason(data):
        return {name: one for name, one in evaluators.items() if not needs_labels(one)}
    return {
        name: one
        for name, one in evaluators.items()
        if not looks_at_images(one) and not (needs_labels(one) and missing_labels_reason(data, one))
    }


def protocols(evaluators: Mapping[str, Evaluator], data: DataModule, found: Figures | None = None) -> dict[str, str]:
    """How each figure of the table is made, by evaluator, and what could not be measured, with the reason.

    Args:
        found: the figures of the trained network, see `evaluation.base.protocol`.
    """
    told = {name: protocol(one, found) for name, one in select_evaluators(evaluators, data).items()}
    reasons = {name: missing_labels_reason(data, one) for name, one in evaluators.items() if needs_labels(one)}
    left_out = [name for name, reason in reasons.items() if reason]
    return told | ({"not measured": f"{', '.join(left_out)}, since {reasons[left_out[0]]}"} if left_out else {})


def run_evaluator(evaluator: FeatureEvaluator, train: Features, test: Features | None) -> Figures:
    """What an evaluator says of features. One that needs no labels looks at the training images where no others are.

    Raises:
        UserError: it needs labelled test images, and ``test`` is None.
    """
    if test is None and needs_labels(evaluator):
        raise UserError(f"{type(evaluator).__name__} compares with the labels of test images, and there are none.")
    return evaluator(train, train if test is None else test)


def always_largest(train: Features, test: Features | None) -> Figures:
    """The row of answering the largest class, where classes are so unequal that accuracies flatter; else nothing."""
    if test is None or train.labels is None or test.labels is None:
        return {}
    figures = balance.always_largest(train.labels, test.labels)
    return {f"{probe}_{name}": value for probe in ("knn", "linear") for name, value in figures.items()}


def run_evaluators(evaluators: Mapping[str, Evaluator], backbone: nn.Module, data: DataModule, pair: Pair) -> Figures:
    """Everything the evaluators say of a backbone and of its train and test features."""
    found: Figures = {}
    for evaluator in evaluators.values():
        found |= evaluator.on_images(backbone, data) if looks_at_images(evaluator) else run_evaluator(evaluator, *pair)
    return found


def classifiers(method: Method, data: DataModule, folder: RunFolder) -> dict[str, Figures]:
    """Figures of a method's `classifiers` on the test images; all of them are kept in ``classification.json``.

    Returns:
        For the summary: the figures without the confusion; nothing where no class is learned or no test image has one.
    """
    test = data.data.test
    if not method.classifiers() or test is None or test.known is None:
        return {}
    found, main = {}, "top1" if test.targets is None else MAIN[test.targets.kind]
    for name, network in method.classifiers().items():
        figures = classification.figures(network, data.eval_dataloader("test"), method.device)
        found[name] = {**figures, **over_epochs(folder.read_metrics(), name, main)}
    content = {"classes": list(data.data.classes), "classifiers": found}
    write_text(folder.classification, json.dumps(content, indent=2) + "\n")
    return {name: {k: v for k, v in row.items() if k != "confusion"} for name, row in found.items()}


def over_epochs(rows: Sequence[Mapping[str, str]], name: str, figure: str) -> dict[str, float]:
    """``best_top1``, which is chosen on the test images, and ``median_top1`` of the last `LAST` evaluations.

    Args:
        name: of the network. figure: by which it is judged: ``top1``, ``map`` or ``r2``.
    """
    values = [float(row[f"{name}_{figure}"]) for row in rows if row.get(f"{name}_{figure}")]
    last = statistics.median(values[-LAST:]) if values else math.nan
    return {f"best_{figure}": max(values), f"median_{figure}": last} if values else {}


class Pixels(nn.Module):
    """The images themselves as features, ``[B, 3, H, W]`` to ``[B, 3 H W]``: what can be said without a network.

    It has one unused parameter, since extraction asks a network where it lives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)
