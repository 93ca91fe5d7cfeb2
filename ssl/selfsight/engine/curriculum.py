"""EfficientTrain as a callback: a run begins with small, weakly augmented images and ends with its own."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import nn

from selfsight.backbones.interface import check_sizes, patch_side
from selfsight.contracts import Backbone
from selfsight.datamodules import DataModule, SemiDataModule
from selfsight.datamodules.views.view import View
from selfsight.engine.prepared import PreparedCallback
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.optim.curriculum import MAGNITUDES, SIZES, Curriculum, stages
from selfsight.optim.schedule import Clock
from selfsight.validation import takes, whole


@takes(sizes=whole(2), magnitudes=whole(1))
class EfficientTrain(PreparedCallback):
    """Gives the data module a `Curriculum`: the low frequencies of the views, and a share of their magnitude.

    Stages have as many epochs each. Views of every size shrink by the same share, to whole patches or cells where the
    network or the method has them. Nothing is kept: the stage is a function of the epoch and of the run's length.

    Wang, Yue, Lu, Liu, Zhong, Song, Huang: EfficientTrain. ICCV 2023, arXiv:2211.09703. Unlike there, the batch stays
    as large as it is, and positions of transformers are resized by the network itself, their moments not at all.

    Args:
        sizes: of the images in each stage, as shares of the last one.
        magnitudes: of the views' policies, likewise.

    Attributes:
        about: what the stages are, for the head of a run; empty until it is `prepare` d.
    """

    def __init__(self, sizes: Sequence[int] = SIZES, magnitudes: Sequence[int] = MAGNITUDES) -> None:
        self.sizes, self.magnitudes = sizes, magnitudes

    def setup(self, trainer: Trainer, pl_module: Method, stage: str) -> None:  # type: ignore[override]
        self.prepare(pl_module, trainer.datamodule, pl_module.clock)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: Method, stage: str) -> None:  # type: ignore[override]
        """Who looks at views after the training sees them as they are described."""
        trainer.datamodule.follow(None)  # type: ignore[attr-defined]

    def prepare(self, learner: Method, data: DataModule, length: Clock, *, graphs: bool = False) -> None:
        """Have ``data`` follow the curriculum of a run of this length.

        Args:
            graphs: steps replay recorded kernels.

        Raises:
            UserError: sizes that do not grow, or a run that can learn from images of one size alone, or has nothing
                that would grow.
        """
        if not isinstance(data, DataModule):
            raise UserError(
                f"callbacks=efficienttrain needs a data module of selfsight, which makes its views smaller, and "
                f"{type(data).__name__} is none; take datamodule=images or semi."
            )
        if graphs:
            raise UserError(
                "callbacks=efficienttrain changes the size of the images, and trainer.cuda_graphs=true replays kernels "
                "of one size; leave it false."
            )
        epochs = max(1, math.ceil(length.epochs))
        found = stages(epochs, self.sizes, self.magnitudes)
        curriculum = Curriculum(
            tuple(found), math.lcm(2, learner.cell, *(patch_side(net) or 1 for net in teachers(learner)))
        )
        views = views_of(data)
        firsts = [0, *(stage.end for stage in found[:-1])]
        begins = [first for first, stage in zip(firsts, found, strict=True) if first < stage.end]
        full = sorted({view.size for view in views}, reverse=True)
        sides = {first: [curriculum.side(size, first) for size in full] for first in begins}
        graded = any(view.graded for view in views)
        if all(side == full for side in sides.values()) and not graded and epochs >= len(found):
            raise UserError(
                f"callbacks=efficienttrain has nothing to do: views of {_listed(full)} pixels cannot be made smaller "
                f"in whole cells of {curriculum.cell}, and have no magnitude; leave it out, or take larger images "
                "(dataset.image_size=)."
            )
        refuse_one_size(learner, sorted({side for of_stage in sides.values() for side in of_stage}))
        data.follow(curriculum)
        grows = _told({first: " and ".join(map(str, side)) for first, side in sides.items()})
        strengths = {first: f"{curriculum.strength(first):.2g}" for first in begins}
        strong = f"their magnitude is {_told(strengths)} of its own" if graded else "they have no magnitude to grow"
        few = (
            f"; {len(begins)} of {len(found)} stages in {epochs} epoch{'s' * (epochs > 1)}"
            if len(begins) < len(found)
            else ""
        )
        self.about = f"EfficientTrain: views of {grows} pixels; {strong}{few}"


def views_of(data: DataModule) -> list[View]:
    """All views that a run learns from."""
    return [*data.labelled.views, *data.unlabelled.views] if isinstance(data, SemiDataModule) else data.views


def teachers(learner: Method) -> list[nn.Module]:
    """Networks that see the views beside the backbone, where the method learns from such."""
    teacher = getattr(learner, "teacher", None)
    return [part for part in teacher.modules() if isinstance(part, Backbone)] if isinstance(teacher, nn.Module) else []


def refuse_one_size(learner: Method, sides: Sequence[int]) -> None:
    """
    Raises:
        UserError: the method, its network or the teacher that it learns from does not take images of these sides.
    """
    if len(sides) == 1:
        return
    said = f"callbacks=efficienttrain shows views of {_listed(sides)} pixels"
    try:
        for side in sides:
            learner.check_side(side)
    except UserError as error:
        raise UserError(
            f"{said}, which the method does not take ({_fact(error)}); choose larger images (dataset.image_size=) or "
            "another method, or leave it out."
        ) from None
    for network in (learner.backbone, *teachers(learner)):
        try:
            check_sizes(network, sides)
        except UserError as error:
            whose = "network" if network is learner.backbone else "teacher"
            raise UserError(
                f"{said}, which the {whose} does not take ({_fact(error)}); choose one for any size, such as a ResNet, "
                "a ConvNeXt, or a ViT with backbone.dynamic_img_size=true, or leave it out."
            ) from None


def _fact(error: UserError) -> str:
    """What a sentence says, without its advice, which is for views of one size."""
    return re.split(r"[:;] ", str(error))[0].rstrip(".")


def _listed(sides: Sequence[int]) -> str:
    *first, last = map(str, sides)
    return f"{', '.join(first)} and {last}" if first else last


def _told(values: dict[int, str]) -> str:
    """``160 (epochs 1 to 6), 192 (7 to 8), 224 (from 9 on)`` of values by the first epoch, counted from 0."""
    runs = [(value, [first for first, _ in same]) for value, same in itertools.groupby(values.items(), lambda i: i[1])]
    ends = [firsts[0] for _, firsts in runs[1:]]
    parts = [f"{value} (to epoch {end})" for (value, _), end in zip(runs, ends, strict=False)]
    return ", ".join([*parts, f"{runs[-1][0]} (from epoch {runs[-1][1][0] + 1} on)"])
