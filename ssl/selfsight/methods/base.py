"""What all methods share: a backbone, an optimiser with its schedules, and a clock. Nothing of any one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.optim.groups import ParamGroup, decayed_and_plain
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock


@dataclass(frozen=True)
class Gallery:
    """Rows of images in which a method shows what it does.

    Attributes:
        title, note: a heading, and one sentence on what to see.
        images: ``[rows, columns, 3, H, W]``, normalised as the views are.
        captions: a word below each image, ``""`` for none; empty for no captions at all.
        right: ``[rows, columns]`` bool, images marked as mistaken where it is False; None where nothing can be.
        points: ``[rows, columns, n, 2]``, places (x, y) in the images as shares of their sides; the k-th points of a
            row belong together. None for none.
        labelled: ``[rows, m]``, positions of labelled images to show behind those of each row; captions go on over
            them. None for none.
    """

    title: str
    note: str
    images: Tensor
    captions: Sequence[Sequence[str]] = ()
    right: Tensor | None = None
    points: Tensor | None = None
    labelled: Tensor | None = None


class Method(LightningModule):
    """A way of learning. A subclass adds its parts and buffers in the constructor and writes `training_step`.

    `training_step(batch, batch_idx)` returns a dict: ``loss`` (scalar with gradient) and any named monitors (detached
    scalars, kept on the device). Logging, schedules and the optimiser are taken care of here and in the jobs.

    Without a trainer the same method runs in a plain loop: set `clock`, then per step call `begin_step(step)`,
    `training_step`, ``loss.backward()``, `on_after_backward()`, ``optimizer.step()``, `end_step()`.

    Attributes:
        backbone: timm interface (``num_features``, ``feature_info``, pooled ``forward``).
        recipe: optimiser and schedules; None until `configure` is called.
        clock: lengths of the run in steps, epochs and examples.
        step: optimiser steps taken before this one. epoch: ``step // clock.steps_per_epoch``.
        scheduled: the values of this step by name (``lr``, and whatever the schedule group names, such as
            ``teacher_momentum`` or ``temperature``).
    """

    #: views the method needs, for the sentence that refuses others: (fewest, most or None)
    n_views: tuple[int, int | None] = (1, None)
    #: schedules the method reads, besides the learning rate's
    schedules: tuple[str, ...] = ()
    #: parts that `trainer.compile` leaves alone, by attribute
    uncompiled: tuple[str, ...] = ()

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.recipe: OptimizationRecipe | None = None
        self.clock = Clock(examples=1, batch_size=1, epochs=1, steps_per_epoch=1)
        self.step = 0
        self.scheduled: dict[str, float] = {}
        self._optimizer: Optimizer | None = None
        self._began: int | None = None

    @property
    def epoch(self) -> int:
        return self.step // self.clock.steps_per_epoch

    def configure(self, recipe: OptimizationRecipe, clock: Clock) -> Method:
        """Give the method its optimiser recipe and the length of the run; returns itself.

        Raises:
            UserError: the recipe lacks a schedule that the method reads.
        """
        for name in self.schedules:
            if name not in recipe.schedules:
                raise UserError(
                    f"{type(self).__name__} follows a schedule '{name}', and the one chosen has none; take the "
                    f"method's own schedule, or add +schedule.{name} to this one."
                )
        self.recipe, self.clock = recipe, clock
        return self

    def chance_loss(self) -> float | None:
        """Loss of a method that guesses, for the curve and the alarm; None where there is no such number."""
        return None

    def classifiers(self) -> dict[str, nn.Module]:
        """Networks that give class scores ``[B, K]`` of images, by name; none where classes are not learned."""
        return {}

    def galleries(self, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
        """Pictures of what this method does with some images, for the report; called in eval mode without gradient.

        Args:
            batch: the un-augmented images as view 0, then views as in training, all with their boxes.
            classes: names of the classes; empty without.
        """
        return []

    def param_groups(self) -> list[ParamGroup]:
        """Parameters in groups. Default: biases and normalisation excluded from weight decay and layer adaptation."""
        return decayed_and_plain(self)

    def configure_optimizers(self) -> Optimizer:
        assert self.recipe is not None, "configure(recipe, clock) comes before training"
        self._optimizer = self.recipe.build(self.param_groups(), self.clock)
        return self._optimizer

    def begin_step(self, step: int) -> None:
        """Set the clock to ``step`` and every scheduled value (learning rate, weight decay, momenta) to it."""
        self.step = step
        if self.recipe is not None:
            self.scheduled = self.recipe.values(step, self.clock)
            if self._optimizer is not None:
                self.recipe.apply(self._optimizer, self.scheduled)
        if self._began != step:
            self._began = step
            self.before_step()

    def end_step(self) -> None:
        """Called after the optimiser's step."""
        self.after_step()

    def before_step(self) -> None:
        """Called once before an optimiser step's first batch."""

    def after_step(self) -> None:
        """Called after the optimiser's step: what follows the updated weights (a teacher, say) moves here."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.end_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begin_step(self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        raise TypeError(f"{type(self).__name__} has to define training_step")
