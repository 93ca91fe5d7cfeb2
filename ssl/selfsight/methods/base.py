"""What all methods share: a backbone, an optimiser with its schedules, and a clock. Nothing of any one method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.backbones.interface import patch_side
from selfsight.errors import UserError
from selfsight.methods.second_pass import SecondPass
from selfsight.nn.step_state import StepState
from selfsight.optim.groups import ParamGroup, all_parameters, split_no_decay
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.sam import SAM
from selfsight.optim.schedule import Clock


class SkippedStep(Exception):
    """Raised before the optimiser moves anything: the step is not to be taken."""


class Method(StepState, LightningModule):
    """A way of learning. A subclass adds its parts and buffers in the constructor and writes `training_step`.

    `training_step(batch, batch_idx)` returns a dict: ``loss`` (scalar with gradient) and any named monitors (detached
    scalars, kept on the device). Logging, schedules and the optimiser are taken care of here and by the trainer.

    A step is an optimiser step. Where gradients are accumulated it has several batches, and nothing that learns moves
    between them:

    - `before_step` comes before its first batch: a target network moves, images are clustered;
    - `collect` notes what each batch adds to queues, banks and running means;
    - `on_before_optimizer_step`, Lightning's, meets the whole gradients: to clip them, or to keep a part from moving;
      those of a step that is taken twice each time, see `goes_again`;
    - `after_step` comes after the optimiser: a teacher follows the new weights. `take_in` then gets all that was
      collected.

    Without a trainer the same method runs in a plain loop, with ``batches`` of each step::

        method.configure(recipe, clock)
        optimizer = method.configure_optimizers()
        for step, batches in enumerate(data):
            for i, batch in enumerate(batches):
                method.begin_step(step)
                loss = method.training_step(batch, i)["loss"] / len(batches)
                loss.backward()
            method.on_before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            method.end_step()

    Attributes:
        backbone: timm interface (``num_features``, ``feature_info``, pooled ``forward``).
        recipe: optimiser and schedules; None until `configure` is called.
        clock: lengths of the run in steps, epochs and examples.
        step: optimiser steps taken before this one.
        scheduled: the values of this step by name (``lr``, and whatever the schedule group names, such as
            ``teacher_momentum`` or ``temperature``).

    Raises:
        UserError: the class has no `training_step`.
    """

    #: facts of the data that the constructor takes and a configuration need not say, by the argument's name:
    #: num_classes, num_images, num_unlabelled, labels, batch_size, mean, std
    needs: tuple[str, ...] = ()
    #: whether a batch is a `SemiBatch`: labelled and unlabelled images side by side
    few_labels: bool = False
    #: views the method needs, for the sentence that refuses others: (fewest, most or None)
    n_views: tuple[int, int | None] = (1, None)
    #: schedules the method reads, besides the learning rate's
    schedules: tuple[str, ...] = ()
    #: how the loss of an image depends on the others of its batch, so that several batches of a step are not one large
    #: one; empty where it does not
    across_images: str = ""
    #: how it depends on the share of a batch that its process has; empty where several processes equal one
    per_process: str = ""
    #: what a person may not expect of what it learns from, for the head of a run
    about: str = ""
    #: parts that `trainer.compile` leaves alone, by attribute
    uncompiled: tuple[str, ...] = ()
    #: weight decay and layer adaptation: of ``all`` parameters, or of ``kernels``, not of biases and normalisation
    decay: Literal["all", "kernels"] = "kernels"
    #: position embeddings and tokens are decayed like kernels
    decay_places: bool = False
    #: numbers of first features that it learns from besides all of them, see `methods.matryoshka`
    prefixes: tuple[int, ...] = ()
    #: whether it learns from a batch once more, of whose features it gets the first ones
    on_prefix: bool = False

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        if type(self).training_step is Method.training_step:
            raise UserError(
                f"{type(self).__name__} has no training_step(self, batch, batch_idx); a method learns by one that "
                'returns {"loss": ...}.'
            )
        self.backbone = backbone
        self.recipe: OptimizationRecipe | None = None
        self.clock = Clock(examples=1, batch_size=1, epochs=1, steps_per_epoch=1)
        self.step = 0
        self.scheduled: dict[str, float] = {}
        self._optimizer: Optimizer | None = None
        self._within_step = False
        self._second_pass = SecondPass()

    # --- what a method says of itself --------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """Loss and monitors of a batch: the algorithm box."""
        raise TypeError(f"{type(self).__name__} has to define training_step")

    def before_step(self) -> None:
        """Called once before each optimiser step's first batch, with clock and schedules at this step."""

    def after_step(self) -> None:
        """Called once after each optimiser step: what follows the updated weights moves here."""

    def shown_once(self, *, plain: bool) -> nn.Module | str:
        """A frozen network that has to see each image once only, as evaluation shows it, for `take_features`.

        Args:
            plain: the views are what evaluation sees, too.

        Returns:
            The network; or in words why it sees every view, empty where the method has no such network.
        """
        return ""

    def take_features(self, x: Tensor, indices: Tensor) -> None:
        """Get what `shown_once` asks for: features ``[n, D]`` of the images ``indices [n]``."""

    def chance_loss(self) -> float | None:
        """Loss of a method that guesses, for the curve and the alarm; None where there is no such number."""
        return None

    def classifiers(self) -> dict[str, nn.Module]:
        """Networks that give class scores ``[B, K]`` of images, by name; none where classes are not learned."""
        return {}

    def param_groups(self) -> list[ParamGroup]:
        """Parameters in groups, as `decay` says."""
        groups = all_parameters if self.decay == "all" else split_no_decay
        return groups(self, decay_places=self.decay_places)

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and carried away: the backbone, or the average that the authors take for it."""
        return self.backbone

    @property
    def cell(self) -> int:
        """Pixels by which the sides of its views have to divide: a patch of the backbone, or 1."""
        return patch_side(self.backbone) or 1

    def check_side(self, side: int) -> None:
        """Refuse square views of ``side`` pixels that the method, whatever its backbone takes, cannot learn from.

        Raises:
            UserError: they are such.
        """

    def tell(self, line: str) -> None:
        """One thing more for the head of a run."""
        self.about = f"{self.about}; {line}" if self.about else line

    # --- what a run calls --------------------------------------------------------------------------------------------

    @property
    def goes_again(self) -> bool:
        """Whether the gradients at hand are the second ones of a step that is taken twice (`selfsight.optim.SAM`)."""
        return self._second_pass.begun

    @property
    def epoch(self) -> int:
        """Epochs that lie behind this step."""
        return self.step // self.clock.steps_per_epoch

    def configure(self, recipe: OptimizationRecipe, clock: Clock) -> Method:
        """Give the method its optimiser recipe and the length of the run; returns itself.

        Raises:
            UserError: the recipe lacks a schedule that the method reads.
        """
        self._refuse_without_schedules(recipe.schedules)
        self.recipe, self.clock = recipe, clock
        return self

    def configure_optimizers(self) -> Optimizer:
        """The optimiser on `param_groups`, as the recipe says; Lightning calls this, too.

        Raises:
            UserError: `configure` has not been called.
        """
        if self.recipe is None:
            raise UserError(
                f"{type(self).__name__} knows no optimiser yet; call configure(recipe, clock) before training."
            )
        self._optimizer = self.recipe.build(self.param_groups(), self.clock)
        return self._optimizer

    def begin_step(self, step: int) -> None:
        """Set the clock to ``step`` and every scheduled value (learning rate, weight decay, momenta) to it.

        May be called before every batch of a step; `before_step` comes with the first.

        Raises:
            UserError: the method reads a schedule, and there is none.
        """
        first = not self._within_step or step != self.step
        self.set_clock(step)
        if first:
            for part in self.states():
                part.discard()  # of a step that was broken off
            self._within_step = True
            self.before_step()

    def set_clock(self, step: int) -> None:
        """Set every scheduled value to ``step``, and begin nothing.

        Raises:
            UserError: the method reads a schedule, and there is none.
        """
        self.step = step
        if self.recipe is not None:
            self.scheduled = self.recipe.values(step, self.clock)
            if self._optimizer is not None:
                self.recipe.apply(self._optimizer, self.scheduled)
        self._refuse_without_schedules(self.scheduled)

    def end_step(self) -> None:
        """Called after the optimiser's step: moves what moves once a step."""
        self.after_step()
        for part in self.states():
            part.commit()
        self._within_step = False

    def skip_step(self) -> None:
        """Called in place of `end_step` where the optimiser has not stepped: what the batches brought is forgotten."""
        for part in self.states():
            part.discard()
        self._within_step = False

    def _refuse_without_schedules(self, known: Mapping[str, Any]) -> None:
        for name in self.schedules:
            if name not in known:
                raise UserError(
                    f"{type(self).__name__} follows a schedule '{name}', and the one chosen has none; take the "
                    f"method's own schedule, or add +schedule.{name} to this one."
                )

    # --- what Lightning calls ----------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begin_step(self.global_step)
        if isinstance(self._optimizer, SAM):
            first = batch_idx % self.trainer.accumulate_grad_batches == 0
            self._second_pass.note(batch, batch_idx, first=first)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if isinstance(self._optimizer, SAM) and optimizer_closure is not None:
            optimizer_closure = self._second_pass.after(optimizer_closure, self, self.trainer)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except SkippedStep:
            self.skip_step()
        else:
            self.end_step()
