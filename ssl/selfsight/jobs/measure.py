"""Numbers on frozen features, and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from selfsight.jobs import build
from selfsight.jobs.console import make_table

#: rows of the table, from nothing learnt to what was learnt here
ROWS = {"pixels": "raw pixels", "untrained": "untrained", "pretrained": "pretrained"}


#: figures of the table that are one number, and their titles
SINGLES = {"knn_top1": "kNN", "linear_top1": "linear", "view_knn_top1": "kNN of views", "rank": "rank"}


def figure(key: str, value: float) -> str:
    """A number of the table as a person reads it: shares of 1 in percent."""
    return f"{value:.1f}" if key == "rank" else f"{value:.1%}"


def features(backbone: nn.Module, data: Any, stage: str = "final") -> tuple[Any, Any]:
    """Train and test features of a backbone, from un-augmented images."""
    return staged_features(backbone, data, [stage])[stage]


def staged_features(
    backbone: nn.Module, data: Any, stages: list[str], *, head: nn.Module | None = None, cache: Path | None = None
) -> dict[str, tuple[Any, Any]]:
    """Train and test features by stage, from one pass over the images, or from the folder ``cache`` where they lie."""
    found = []
    for split in ("train", "test"):
        if cache is None:
            extract = build.library("evaluation.features").extract
            found.append(extract(backbone, data.eval_dataloader(split), stages=stages, head=head))
        else:
            kept = build.library("evaluation.cache").FeatureCache(cache)
            found.append(kept.extract(backbone, data, split, stages=stages, head=head))
    return {stage: (found[0][stage], found[1][stage]) for stage in stages}


def applicable(evaluators: Mapping[str, Any], labelled: bool) -> dict[str, Any]:
    """Evaluators of the table: without labels those that need none; with labels those that features are enough for."""
    if labelled:
        return {name: one for name, one in evaluators.items() if not hasattr(one, "on_images")}
    return {name: one for name, one in evaluators.items() if not one.needs_labels}


def numbers(evaluators: Mapping[str, Any], backbone: nn.Module, data: Any, pair: tuple[Any, Any]) -> dict[str, Any]:
    """Everything the evaluators say of a backbone and of its train and test features."""
    found: dict[str, Any] = {}
    for evaluator in evaluators.values():
        found |= evaluator.on_images(backbone, data) if hasattr(evaluator, "on_images") else evaluator(*pair)
    return found


def show(console: Console, summary: Mapping[str, Any], protocols: Mapping[str, str]) -> None:
    """The table of a run: raw pixels, untrained and pretrained network under the same protocols."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    shots = sorted({k for key in rows for k in summary[key].get("few_shot", {})}, key=int)
    singles = [(key, title) for key, title in SINGLES.items() if any(key in summary[row] for row in rows)]
    table = make_table("", *[title for _, title in singles], *[f"{k}/class" for k in shots])
    for row, label in rows.items():
        values = summary[row]
        cells = ["" if key not in values else figure(key, values[key]) for key, _ in singles]
        for k in shots:
            shot = values.get("few_shot", {}).get(k)
            cells.append("" if shot is None else f"{100 * shot['mean']:.1f} ± {100 * shot['std']:.1f}%")
        table.add_row(label, *cells)
    console.print(table)
    for name, protocol in protocols.items():
        console.print(f"  {name}: {protocol}", style="dim", highlight=False)


class Pixels(nn.Module):
    """The images themselves as features, ``[B, 3, H, W]`` to ``[B, 3 H W]``: what can be said without a network.

    It has one unused parameter, since extraction asks a network where it lives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def describe(data: Any) -> str:
    """``digits (1,437 images, 10 classes)``."""
    images = len(data.train) + (len(data.unlabelled) if data.unlabelled is not None else 0)
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    return f"{data.name} ({images:,} images{classes})"


def class_name(data: Any, label: int) -> str:
    return str(data.classes[label]) if 0 <= label < data.num_classes else "no label"
