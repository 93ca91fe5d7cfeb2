"""Checkpoints that are whole or absent and need no unpickling of code to read; stopping where a run can go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import nn

from selfsight.errors import UserError
from selfsight.files import replace
from selfsight.runs.console import leave_closed_terminal

#: what Lightning saves: tensors, numbers and text by name, nested
Checkpoint = dict[str, Any]


class AtomicCheckpoints(CheckpointIO):
    """Writes beside the target, flushes to disk, moves over it. Reads plain tensors and numbers only."""

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, target, lambda: keep_previous(target))

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> Checkpoint:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write_checkpoint(content: Checkpoint, path: Path, before_it_moves: Callable[[], object] = lambda: None) -> None:
    """Write tensors, numbers and text to the disk itself, whole or not at all.

    Args:
        before_it_moves: called when the new file is whole and not yet in its place.

    Raises:
        UserError: it cannot be written.
    """

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        before_it_moves()

    try:
        replace(path, write)
    except (UserError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error.__context__ if isinstance(error, UserError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise UserError(f"the checkpoint '{path}' cannot be written ({reason}); the run needs space there.") from None


def keep_previous(path: Path) -> None:
    """Keep the checkpoint at ``path`` as the one before, while another one is written; there always is a whole one.

    A second name for the same bytes, or a copy where the file system knows no second names.
    """
    if not path.is_file():
        return

    def link(beside: Path) -> None:
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)

    replace(previous(path), link)


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's content, on the CPU. Every byte of it is held against its checksum first.

    Raises:
        UserError: it is missing, cut off or damaged, or holds more than tensors and numbers.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; a run writes its first one after its first epoch.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums into its archives, and does not look at them
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its part {damaged} does not match")
        content: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"'{path}' cannot be read as a checkpoint ({reason}).") from None
    return content


def training_checkpoint(path: Path) -> Checkpoint:
    """The content of a checkpoint that a training has left.

    Raises:
        UserError: see `read_checkpoint`, or it is a file of something else.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"'{path}' cannot be read as a checkpoint (it holds no training's state).")
    return content


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"previous{path.suffix}")


def usable_checkpoint(path: Path) -> tuple[Path, str]:
    """The last checkpoint that is whole, and a sentence where it is not the one at ``path``.

    Raises:
        UserError: neither that one nor the one before can be read.
    """
    try:
        training_checkpoint(path)
    except UserError as error:
        try:
            content = training_checkpoint(previous(path))
        except UserError:
            raise error from None
        return previous(path), (
            f"{error} The one before it is used: '{previous(path)}', of epoch {int(content['epoch']) + 1}, step "
            f"{content['global_step']}."
        )
    return path, ""


def epochs_done(path: Path) -> int:
    """How many epochs the training has come through whose last checkpoint is at ``path``."""
    loops = training_checkpoint(usable_checkpoint(path)[0])["loops"]
    return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])


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
        seed_step([self.seed, trainer.current_epoch, batch_idx, trainer.global_rank], pl_module.device)


def seed_step(words: Sequence[int], device: torch.device) -> None:
    """Set all generators by the numbers that a step's randomness follows from: seed, epoch, batch, process."""
    drawn = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    # torch.manual_seed would note down, with the whole stack, to seed every kind of device that is not in use
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)


class Interrupted(BaseException):
    """The run was asked to stop. No `Exception`: one may be raised anywhere, and whoever expects those lets it pass.

    Attributes:
        signal: number of the signal that asked.
        saved: whether its checkpoint is of this moment; it is an earlier one where the run stopped at once.
    """

    def __init__(self, number: int = signal.SIGINT, *, saved: bool = True) -> None:
        super().__init__(number)
        self.signal, self.saved = number, saved


class BetweenSteps(Callback):
    """What is done before a step's first batch, on all processes at the same one.

    Several processes may want it at different steps; they agree on one every `ASKED_EVERY` batches.
    """

    ASKED_EVERY = 20

    def wanted(self) -> bool:
        """Whether this process wants it done."""
        raise NotImplementedError

    def do(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do it."""
        raise NotImplementedError

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:  # gradients that wait for more are in no checkpoint
            return
        wanted = self.wanted()
        if trainer.world_size > 1:
            steps = batch_idx // trainer.accumulate_grad_batches
            wanted = steps % self.ASKED_EVERY == 0 and any_process(trainer, wanted)
        if wanted:
            self.do(trainer, pl_module)


def any_process(trainer: Trainer, wanted: bool) -> bool:
    """Whether one of the processes wants something; all of them ask at once."""
    return wanted if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(wanted, all=False)


class TimedCheckpoints(BetweenSteps):
    """A checkpoint every so many minutes, inside an epoch, too. Weights that are no numbers replace no good ones."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, 60 * minutes
        self.last = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = time.monotonic()  # one is written now

    def wanted(self) -> bool:
        return time.monotonic() - self.last >= self.seconds

    def do(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if all_finite(pl_module):
            trainer.save_checkpoint(self.path)
        self.last = time.monotonic()


class GracefulInterrupt(BetweenSteps):
    """Ctrl-C, or a signal by which systems end or move a run: finish the step, write the checkpoint, stop.

    A second one stops at once, and the checkpoint before is kept. So does the first one where an evaluation between two
    epochs takes longer than those systems wait; Ctrl-C leaves that to the person.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    PATIENCE = 8.0  # seconds that an evaluation has; what sends signals kills after 10 or more

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: int | None = None
        self.before: dict[int, Callable | int | None] = {}
        self.between_epochs = False

    def handler(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise Interrupted(self.asked, saved=False)
        self.asked = number
        if number == getattr(signal, "SIGHUP", None):
            leave_closed_terminal()
        self.hurry()

    def hurry(self) -> None:
        """From now on the evaluation under way has so much time, where a system has asked to stop."""
        if self.between_epochs and self.asked not in (None, signal.SIGINT) and hasattr(signal, "setitimer"):
            before = signal.signal(signal.SIGALRM, self.handler)  # heard as a second signal
            self.before.setdefault(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    def listen(self) -> None:
        """Hear the signals from now on. Lightning puts itself before us, and gives way when training starts."""
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in self.SIGNALS if hasattr(signal, name)]
            found = {number: signal.signal(number, self.handler) for number in numbers}
            self.before = self.before or found

    def restore(self) -> None:
        """Leave the signals to whoever heard them before. Lightning gives them back to us when it is done."""
        self.rest()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def rest(self) -> None:
        """An epoch's evaluation is over."""
        self.between_epochs = False
        if self.asked is not None and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def wanted(self) -> bool:
        return self.asked is not None

    def do(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        self.hand_on()
        raise Interrupted(self.asked or signal.SIGTERM)

    def hand_on(self) -> None:
        """Let a launcher that had asked for SIGUSR2 before, as submitit does to requeue the job, have it now."""
        if self.asked is None or self.asked != getattr(signal, "SIGUSR2", None):
            return
        before = self.before.get(self.asked)
        if callable(before):
            self.restore()
            before(self.asked, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rest()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.between_epochs = True
        self.hurry()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore()
        if any_process(trainer, self.wanted()):  # in the last epoch, whose checkpoint is written
            self.hand_on()
            raise Interrupted(self.asked or signal.SIGTERM)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.restore()


def all_finite(module: nn.Module) -> bool:
    """Whether all parameters and running statistics are numbers."""
    statistics = (value for name, value in module.named_buffers() if name.rpartition(".")[2].startswith("running_"))
    return all(bool(torch.isfinite(value).all()) for value in (*module.parameters(), *statistics))
