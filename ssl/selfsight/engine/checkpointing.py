"""Checkpoints that are whole or absent and need no unpickling of code to read; stopping where a run can go on."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from selfsight.errors import UserError
from selfsight.files import replace

#: what Lightning saves: tensors, numbers and text by name, nested
Checkpoint = dict[str, Any]


class AtomicCheckpoints(CheckpointIO):
    """Writes beside the target, flushes to disk, moves over it. Reads plain tensors and numbers only."""

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)

        def write(beside: Path) -> None:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())

        try:
            replace(target, write)
        except (UserError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            cause = error.__context__ if isinstance(error, UserError) else error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise UserError(
                f"the checkpoint '{target}' cannot be written ({reason}); the run needs space there."
            ) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> Checkpoint:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's content, on the CPU.

    Raises:
        UserError: it is missing, cut off, or holds more than tensors and numbers.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; a run writes its first one after its first epoch.")
    try:
        content: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"'{path}' cannot be read as a checkpoint ({str(error).splitlines()[0][:120]}).") from None
    return content


def checkpointing(path: Path, every: int) -> ModelCheckpoint:
    """Keeps ``last.ckpt`` after every ``every`` epochs and after the last one."""
    return ModelCheckpoint(
        dirpath=path.parent,
        filename=path.stem,
        every_n_epochs=every,
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class StepSeeds(Callback):
    """Makes the randomness of a step (masks, dropped paths, mixed images) follow from seed, epoch, batch and process.

    So there is no state of generators to save: a run that goes on draws what one that never stopped would have drawn,
    and every process draws something else.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        words = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        drawn = int(np.random.SeedSequence(words).generate_state(1)[0])
        random.seed(drawn)
        np.random.seed(drawn)
        # torch.manual_seed would note down, with the whole stack, to seed every kind of device that is not in use
        torch.default_generator.manual_seed(drawn)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(drawn)


class Interrupted(Exception):
    """The run was asked to stop, and its checkpoint is written."""


class GracefulInterrupt(Callback):
    """First Ctrl-C (or SIGTERM): finish the step, write the checkpoint, stop. A second Ctrl-C stops at once.

    Several processes, which may be told at different steps, agree on one every `ASKED_EVERY` batches.
    """

    ASKED_EVERY = 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = False
        self.before: dict[int, Callable | int | None] = {}

    def handler(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        asked = self.asked
        if trainer.world_size > 1:
            asked = batch_idx % self.ASKED_EVERY == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            trainer.save_checkpoint(self.path)
            raise Interrupted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.restore()
