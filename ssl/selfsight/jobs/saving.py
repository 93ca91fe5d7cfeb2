"""Checkpoints that are whole or absent, hold the random state, and need no unpickling of code to read."""

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


class AtomicCheckpoints(CheckpointIO):
    """Writes beside the target, flushes to disk, moves over it. Reads plain tensors and numbers only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint '{target}' cannot be written ({error.strerror}); the run needs space there."
            ) from None

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Raises:
        UserError: it is missing, cut off, or holds more than tensors and numbers.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; a run writes its first one after its first epoch.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
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


class RandomState(Callback):
    """Carries the random generators in the checkpoint, so that a resumed run equals one that never stopped."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": [version, list(numbers), gauss],
            "numpy": [
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored is None:
            return
        version, numbers, gauss = self.restored["python"]
        random.setstate((version, tuple(numbers), gauss))
        keys, position, has_gauss, cached = self.restored["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.restored["torch"])
        if self.restored["cuda"] and len(self.restored["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(self.restored["cuda"])


class Interrupted(Exception):
    """The run was asked to stop, and its checkpoint is written."""


class GracefulInterrupt(Callback):
    """First Ctrl-C (or SIGTERM): finish the step, write the checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = False
        self.before: dict[int, Any] = {}

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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.asked:
            trainer.save_checkpoint(self.path)
            raise Interrupted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.restore()
