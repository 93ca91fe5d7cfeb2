"""EfficientTrain's curricula: how large the images are and how much they are changed, epoch by epoch.

Wang, Yue, Lu, Liu, Zhong, Song, Huang: EfficientTrain: Exploring Generalized Curriculum Learning for Training
Visual Backbones. ICCV 2023, arXiv:2211.09703; EfficientTrain++, TPAMI 2024, arXiv:2405.08768.
Code: LeapLabTHU/EfficientTrain.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from selfsight.errors import UserError

SIZES = (160, 160, 160, 192, 224)
MAGNITUDES = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class Stage:
    """A stretch of epochs.

    Attributes:
        size: side of the images the network sees, of ``full`` in the last stage.
        magnitude: of the RandAugment operations.
        end: first epoch after it.
    """

    size: int
    magnitude: int
    end: int


def stages(epochs: int, sizes: Sequence[int] = SIZES, magnitudes: Sequence[int] = MAGNITUDES) -> list[Stage]:
    """Stretches of equally many epochs, each image of every epoch in it.

    Where there are fewer epochs than stages, some stages have none; the last one always has.

    Raises:
        UserError: no sizes, sizes or magnitudes that shrink, or not as many of both.
    """
    n = len(sizes)
    shrink = any(a > b for values in (sizes, magnitudes) for a, b in itertools.pairwise(values))
    if not n or n != len(magnitudes) or shrink:
        raise UserError(
            f"A curriculum was given the sizes {list(sizes)} and magnitudes {list(magnitudes)}; give sizes and as many "
            "magnitudes, neither of which shrink."
        )
    ends = [epochs * (k + 1) // n for k in range(n)]
    return [Stage(size, m, end) for size, m, end in zip(sizes, magnitudes, ends, strict=True)]


@dataclass(frozen=True)
class Curriculum:
    """What views are in each epoch of a run. It knows nothing but the epoch: a run that goes on is where it was.

    Sizes and magnitudes are shares of those of the last stage, which leaves views as they are described.

    Attributes:
        stages: in their order.
        cell: pixels by which smaller sides divide; even, since a low-frequency crop is.
    """

    stages: tuple[Stage, ...]
    cell: int = 2

    def at(self, epoch: int) -> Stage:
        """The stage of an epoch, counted from 0; the last one beyond the end."""
        return next((stage for stage in self.stages if epoch < stage.end), self.stages[-1])

    def side(self, size: int, epoch: int) -> int:
        """Side in an epoch of views whose full one is ``size``: the nearest multiple of ``cell``."""
        share = self.at(epoch).size / self.stages[-1].size
        cells = min(round(size * share / self.cell), size // self.cell)
        return size if share == 1 or cells == 0 else cells * self.cell

    def strength(self, epoch: int) -> float:
        """Share of the full magnitude in an epoch."""
        return self.at(epoch).magnitude / self.stages[-1].magnitude


@dataclass(frozen=True)
class ComputeStage:
    """A stage of EfficientTrain++, whose stages cost the same and so have the more epochs, the smaller the images are.

    Attributes:
        size, magnitude: as in `Stage`. schedule_epochs: length that the learning rate's schedule has in this stage.
        start, end: epochs of that schedule between which the stage runs.
    """

    size: int
    magnitude: int
    schedule_epochs: int
    start: int
    end: int


def compute_stages(epochs: int, sizes: Sequence[int], full: int = 224) -> list[ComputeStage]:
    """One stage a size; ``epochs`` at the full size cost as much as all of them."""
    found: list[ComputeStage] = []
    for k, size in enumerate(sizes):
        length = int(epochs * full**2 / size**2)
        start = round(found[-1].end * found[-1].size ** 2 / size**2) if found else 0
        found.append(ComputeStage(size, k, length, start, int(length * (k + 1) / len(sizes))))
    return found
