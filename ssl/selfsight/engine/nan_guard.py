"""Stops a training whose loss is no number, and says what usually causes it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from selfsight.engine.checkpointing import all_finite
from selfsight.errors import UserError
from selfsight.runs.folder import RunFolder

#: steps between looks at the loss on an accelerator; each look waits for the device
GUARD_EVERY = 50


class NanGuard(Callback):
    """Looks at the sum of losses, which stays wrong once one of them was: every step on a CPU, now and then elsewhere.

    Raises:
        UserError: naming epoch, step, cause and remedy.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.total: torch.Tensor | None = None
        self.steps = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total, self.steps = None, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(outputs, Mapping)
        loss = outputs["loss"].detach().float()
        self.total = loss if self.total is None else self.total + loss
        self.steps += 1
        if pl_module.device.type == "cpu" or self.steps % GUARD_EVERY == 0:
            self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer, pl_module)
        if not all_finite(pl_module):  # the last update broke what no loss has been computed from yet
            self.stop(trainer, "the weights became no numbers", weights=False)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.total is None or math.isfinite(self.total.item()):
            return
        weights = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        self.stop(trainer, f"the loss became {self.total.item()}", weights)

    def stop(self, trainer: Trainer, what: str, weights: bool) -> None:
        """
        Raises:
            UserError: always; naming place, cause and remedy.
        """
        cause = (
            "the weights are finite, so the loss overflowed: raise the temperature or use trainer.precision=32-true"
            if weights
            else "the weights are not finite either: lower optimizer.lr or give schedule.lr.warmup_epochs more epochs"
        )
        kept = (
            f" The last good checkpoint is kept: {self.folder.checkpoint}." if self.folder.checkpoint.exists() else ""
        )
        raise UserError(f"{what} in epoch {trainer.current_epoch + 1} (step {trainer.global_step}); {cause}.{kept}")
