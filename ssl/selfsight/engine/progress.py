"""How far a training is: a bar over all its steps, or a line now and then."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfsight.runs.console import clock_text

NOTES = 20  # lines of progress


class ProgressBar(Callback):
    """Moves on a terminal; elsewhere there is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        batches = int(trainer.num_training_batches)
        self.task = self.progress.add_task(
            "training",
            total=batches * (trainer.max_epochs or 1),
            completed=trainer.current_epoch * batches,
            epoch=trainer.current_epoch + 1,
        )
        self.progress.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.progress is not None:
            self.progress.update(self.task, epoch=trainer.current_epoch + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StepLines:
    """A line now and then: step, mean loss since the last one, time left."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps, self.start = console, steps, time.monotonic()
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % max(1, self.steps // NOTES) and step != self.steps:
            return
        left = (time.monotonic() - self.start) / step * (self.steps - step)
        mean = sum(self.losses) / len(self.losses)
        self.console.print(f"step {step:>6}/{self.steps}  loss {mean:.3f}  {clock_text(left)} left")
        self.losses.clear()
