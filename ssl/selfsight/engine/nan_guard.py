"""Stops a training whose loss or gradient is no number, and keeps the step that went wrong; or skips such steps."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from selfsight.contracts import Batch, SemiBatch
from selfsight.engine.broken_step import BrokenStep
from selfsight.engine.checkpointing import Checkpoint, all_finite
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.base import SkippedStep
from selfsight.nn.batchnorm import moved_by_layers
from selfsight.runs.folder import RunFolder

#: batches between looks on an accelerator; each look waits for the device
GUARD_EVERY = 50
#: weights beyond this are those of a network that has diverged
DIVERGED = 1e4
GRADIENT = "a gradient became no number"


class NanGuard(Callback):
    """Looks at the sum of losses, which stays wrong once one of them was, and at the gradient, before it is used.

    Where it looks at every batch, the step that went wrong is kept in the run folder before anything has moved by it.
    Several processes agree on what they have seen.

    Attributes:
        skipped: steps that were left out, in all. wrong: the step at hand is one of them.

    Raises:
        UserError: naming epoch, step, cause and remedy.
    """

    def __init__(self, folder: RunFolder, console: Console, options: TrainerOptions, seed: int) -> None:
        self.folder, self.console, self.options, self.seed = folder, console, options, seed
        self.skipped = self.in_a_row = self.batches = 0
        self.wrong = ""
        self.loss: Tensor | None = None
        self.total: Tensor | None = None
        self.batch: Batch | SemiBatch | None = None
        self.batch_idx = 0
        self.before: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: Checkpoint) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total, self.batches = None, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch | SemiBatch, batch_idx: int
    ) -> None:
        self.batch, self.batch_idx = batch, batch_idx
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.wrong = ""
            if self.every(pl_module) == 1:
                self.before = {name: value.clone() for name, value in moved_by_layers(pl_module)}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach().float() * trainer.accumulate_grad_batches
        self.total = self.loss if self.total is None else self.total + self.loss

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches += 1
        if self.batches % self.every(pl_module) == 0:
            self.look(trainer, pl_module, gradient=getattr(trainer.precision_plugin, "scaler", None) is None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """
        Raises:
            SkippedStep: a batch of this step went wrong.
        """
        if not self.wrong:
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        for name, most in (("max_skips_in_a_row", self.in_a_row), ("max_skips", self.skipped)):
            if most > (allowed := getattr(self.options, name)):
                self.stop(trainer, pl_module, f"more than trainer.{name}={allowed} steps went wrong: {self.wrong}")
        if trainer.is_global_zero:
            self.console.print(
                f"[yellow]warning[/yellow] {self.wrong} in epoch {trainer.current_epoch + 1} (step "
                f"{trainer.global_step}): the step is skipped"
            )
        self.restore(pl_module)
        raise SkippedStep

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every(pl_module) > 1:
            self.look(trainer, pl_module, gradient=False)
        if not all_finite(pl_module):  # the last update broke what no loss has been computed from yet
            self.batch = None
            self.stop(trainer, pl_module, "the weights became no numbers")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skipped and trainer.is_global_zero:
            self.console.print(
                f"{self.skipped} of {trainer.global_step} steps were skipped: loss or gradient were no numbers"
            )

    def every(self, module: LightningModule) -> int:
        """Batches from one look to the next."""
        if self.options.look_every != "auto":
            return int(self.options.look_every)
        return 1 if module.device.type == "cpu" or self.options.on_nan == "skip" else GUARD_EVERY

    def look(self, trainer: Trainer, module: LightningModule, gradient: bool) -> None:
        """Stop, or note that this step is to be skipped, where the numbers are none on any process.

        Args:
            gradient: look at the gradient, too; one of 16-mixed is scaled, and looked at by its scaler.
        """
        if self.wrong or self.total is None or self.loss is None:
            return
        numbers = self.total
        if gradient:
            numbers = numbers + get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        here = not math.isfinite(numbers.item())
        wrong = trainer.strategy.reduce_boolean_decision(here, all=False) if trainer.world_size > 1 else here
        if not wrong:
            return
        if not here:
            what = "the loss of another process became no number"
        elif not math.isfinite(self.loss.item()):
            what = f"the loss became {self.loss.item()}"
        else:
            what = GRADIENT if math.isfinite(self.total.item()) else "a loss became no number"
        if self.options.on_nan == "skip":
            self.wrong, self.total = what, None
        else:
            self.stop(trainer, module, what)

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Take back what the step's batches have moved on their way: running statistics of layers."""
        for name, value in moved_by_layers(module):
            value.copy_(self.before[name])

    def stop(self, trainer: Trainer, module: LightningModule, what: str) -> None:
        """
        Raises:
            UserError: always; naming place, cause and remedy.
        """
        largest = max(float(p.detach().abs().max()) for p in module.parameters() if p.numel())
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()) or largest > DIVERGED:
            state = f"have grown to {largest:.1g}" if math.isfinite(largest) else "are not finite either"
            cause = f"the weights {state}: lower optimizer.lr or give schedule.lr.warmup_epochs more epochs"
        elif what == GRADIENT:
            cause = (
                "loss and weights are finite, so its derivative overflowed or is none at this place: use "
                "trainer.precision=32-true or lower optimizer.lr"
            )
        else:
            cause = (
                "the weights are finite, so the loss overflowed: raise the temperature or use trainer.precision=32-true"
            )
        checkpoint = self.folder.checkpoint
        last = f" The last good checkpoint is kept: {checkpoint}." if checkpoint.exists() else ""
        place = f"epoch {trainer.current_epoch + 1} (step {trainer.global_step})"
        raise UserError(f"{what} in {place}; {cause}.{last}{self.keep(trainer, module, what)}")

    def keep(self, trainer: Trainer, module: LightningModule, what: str) -> str:
        """Write the step down where it has been seen before it was taken; returns what to say of that."""
        if self.batch is None:
            return ""
        if self.every(module) > 1:
            config = self.folder.path / "config.yaml"
            return (
                f" With trainer.look_every: 1 in '{config}' a run that goes on keeps the step for `selfsight replay`."
            )
        self.restore(module)
        batches = [self.batch.to("cpu")] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(batches, batches[0])
        if not trainer.is_global_zero:
            return ""
        assert self.loss is not None
        step = BrokenStep(
            cause=what,
            loss=self.loss.item(),
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            batch=self.batch_idx,
            seed=self.seed,
            precision=str(trainer.precision),
            state={name: value.detach().cpu() for name, value in module.state_dict().items()},
            batches=batches,
        )
        try:
            step.write_to(self.folder.broken_step)
        except UserError as error:
            return f" The step could not be kept: {error}"
        return f" Which tensor went wrong first: selfsight replay run={self.folder.path}"
