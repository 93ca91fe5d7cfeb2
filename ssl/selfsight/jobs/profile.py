"""`selfsight profile`: where the time of a training step goes, and what holds it up."""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from rich.console import Console

from selfsight.contracts import Batch
from selfsight.datamodules.loading.reader import RawBatch
from selfsight.engine import build
from selfsight.engine.devices import device
from selfsight.engine.monitor import Monitor
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.options import ProfileOptions, RunOptions
from selfsight.engine.performance import apply_performance_options
from selfsight.engine.precision import WORTH_IT, bf16_gain, bf16_told, resolve_precision, with_fastest
from selfsight.engine.session import make_trainer
from selfsight.engine.teacher_features import TeacherFeatures
from selfsight.runs.console import make_console, make_table
from selfsight.runs.folder import RunFolder

#: parts of a step in their order
PARTS = {
    "data": "waiting for data",
    "views": "making views",
    "forward": "forward",
    "backward": "backward",
    "optimiser": "optimiser",
    "log": "logging",
    "rest": "trainer and the rest",
}


def run(cfg: DictConfig) -> None:
    """Train some steps as `pretrain` would, and say what they were spent on. Nothing is kept."""
    console, timed = make_console(), ProfileOptions.read(cfg)
    parts = build.parts(build.sized(with_fastest(cfg)))
    data, where = parts.datamodule, device(parts.trainer.accelerator)
    parts.method.configure(parts.recipe, parts.length)
    apply_performance_options(parts.method, parts.trainer, where)

    epochs = math.ceil((timed.warmup + timed.steps) / data.steps_per_epoch)
    batches = min(data.steps_per_epoch, timed.warmup + timed.steps)
    trainer = replace(
        parts.trainer, max_epochs=epochs, max_steps=None, max_time=None, limit_batches=batches, checkpoint_every=epochs
    )
    kept: list[Callback] = [
        one for one in parts.callbacks if isinstance(one, TeacherFeatures)
    ]  # the method cannot do without them
    parts = replace(parts, trainer=trainer, loggers=[], callbacks=kept)
    watch = Stopwatch(timed.warmup, timed.steps, synchronise=where.type == "cuda")
    data.on_after_batch_transfer = watch.around(data.on_after_batch_transfer)  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        unheard = Console(file=io.StringIO())
        guard = NanGuard(folder, unheard, parts.trainer, parts.run.seed)
        monitor = Monitor(folder, unheard, None, guard)
        lightning = make_trainer(parts, folder, [First(watch), guard, monitor, Last(watch)])
        lightning.fit(parts.method, datamodule=data)
    if lightning.is_global_zero:
        exact = resolve_precision(trainer.precision, where) == "32-true"
        tell(console, watch.seconds, watch.counted, parts.run, where, exact=exact)


class Stopwatch:
    """Adds the time since the last `mark` to the part that ends now; the first steps do not count."""

    def __init__(self, warmup: int, steps: int, *, synchronise: bool) -> None:
        self.warmup, self.steps, self.synchronise = warmup, steps, synchronise
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.step = 0
        self.last = time.perf_counter()

    @property
    def counted(self) -> int:
        return max(0, min(self.step - self.warmup, self.steps))

    def mark(self, part: str | None) -> None:
        """``part`` ends here; None: what went on until here is nobody's."""
        if self.synchronise:
            torch.cuda.synchronize()  # otherwise the time would go to whoever waits next
        now = time.perf_counter()
        if part is not None and self.warmup <= self.step < self.warmup + self.steps:
            self.seconds[part] += now - self.last
        self.last = now

    def around(self, make: Callable[[RawBatch, int], Batch]) -> Callable[[RawBatch, int], Batch]:
        """The hook that makes the views, timed."""

        def timed(batch: RawBatch, dataloader_idx: int) -> Batch:
            self.mark("data")
            made = make(batch, dataloader_idx)
            self.mark("views")
            return made

        return timed


class First(Callback):
    """Stands before all others."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_epoch_start(self, *args: object) -> None:
        self.watch.mark(None)

    def on_before_zero_grad(self, *args: object) -> None:
        self.watch.mark("forward")

    def on_before_backward(self, *args: object) -> None:
        self.watch.mark("forward")

    def on_after_backward(self, *args: object) -> None:
        self.watch.mark("backward")

    def on_train_batch_start(self, *args: object) -> None:
        self.watch.mark("rest")

    def on_train_batch_end(self, *args: object) -> None:
        self.watch.mark("optimiser")


class Last(Callback):
    """Stands behind all others."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_epoch_start(self, *args: object) -> None:
        self.watch.mark(None)

    def on_train_batch_start(self, *args: object) -> None:
        self.watch.mark("rest")

    def on_train_batch_end(self, *args: object) -> None:
        self.watch.mark("log")
        self.watch.step += 1


def tell(
    console: Console, seconds: Mapping[str, float], steps: int, run: RunOptions, device: torch.device, *, exact: bool
) -> None:
    """Table, speed, and the bottleneck in one sentence; where it computed in float32, whether bf16 would be faster."""
    whole = sum(seconds.values())
    table = make_table("part", "ms a step", "share")
    for part, label in PARTS.items():
        table.add_row(label, f"{1000 * seconds[part] / steps:.1f}", f"{seconds[part] / whole:.0%}")
    table.add_row("whole step", f"{1000 * whole / steps:.1f}", "100%", style="bold")
    console.print(table)
    console.print(
        f"{run.batch_size * steps / whole:,.0f} images/s on {device.type}, {steps} steps of {run.batch_size} images"
    )
    shares = {part: spent / whole for part, spent in seconds.items()}
    console.print(bottleneck(shares, device.type, run.num_workers))
    if exact and device.type == "cpu" and (gain := bf16_gain()) >= WORTH_IT:
        console.print(f"{bf16_told(gain)}, where the network is the bottleneck: trainer.precision=fastest.")


def bottleneck(shares: Mapping[str, float], device: str, num_workers: int | str) -> str:
    """What to change first, from the share of each part."""
    network = shares["forward"] + shares["backward"]
    if shares["data"] > 0.1 and shares["data"] >= shares["views"]:
        return (
            f"The step waits for data {shares['data']:.0%} of its time: give more readers (num_workers, now "
            f"{num_workers}), or smaller files once and for all: selfsight prepare."
        )
    if shares["views"] > 0.25:
        remedy = "trainer.compile=true" if device == "cuda" else "a GPU, smaller images or fewer views"
        return f"Making views takes {shares['views']:.0%} of a step: {remedy} would help."
    if shares["optimiser"] > 0.25:
        return (
            f"The optimiser takes {shares['optimiser']:.0%} of a step: a larger batch or trainer.accumulate makes its "
            "steps fewer."
        )
    if shares["log"] + shares["rest"] > 0.25:
        return (
            f"The step is so short that the trainer's own work is {shares['log'] + shares['rest']:.0%} of it: a larger "
            "batch_size hides that."
        )
    remedy = (
        "precision, compilation and a larger batch are what is left" if device == "cuda" else "a GPU is what is left"
    )
    return f"The network is the bottleneck, as it should be ({network:.0%} in forward and backward): {remedy}."
