"""`selfsight profile`: where the time of a training step goes, and what holds it up."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from rich.console import Console

from selfsight.engine import build
from selfsight.engine.devices import device
from selfsight.engine.monitor import Monitor
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.options import ProfileOptions, RunOptions
from selfsight.engine.performance import apply_performance_options
from selfsight.engine.precision import WORTH_IT, bf16_gain, bf16_told, resolve_precision, with_fastest
from selfsight.engine.session import make_trainer
from selfsight.engine.stopwatch import PARTS, First, Last, Stopwatch, bottleneck
from selfsight.engine.teacher_features import TeacherFeatures
from selfsight.runs.console import make_console, make_table
from selfsight.runs.folder import RunFolder


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
    # the method cannot do without them
    kept: list[Callback] = [one for one in parts.callbacks if isinstance(one, TeacherFeatures)]
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


def tell(
    console: Console, seconds: Mapping[str, float], steps: int, run: RunOptions, device: torch.device, *, exact: bool
) -> None:
    """Table, speed, and the bottleneck in one sentence; where it computed in float32, whether bf16 would be faster."""
    whole = sum(seconds.values())
    rows = (
        [label, f"{1000 * seconds[part] / steps:.1f}", f"{seconds[part] / whole:.0%}"] for part, label in PARTS.items()
    )
    table = make_table("part", "ms a step", "share", rows=rows)
    table.add_row("whole step", f"{1000 * whole / steps:.1f}", "100%", style="bold")
    console.print(table)
    console.print(
        f"{run.batch_size * steps / whole:,.0f} images/s on {device.type}, {steps} steps of {run.batch_size} images"
    )
    shares = {part: spent / whole for part, spent in seconds.items()}
    console.print(bottleneck(shares, device.type, run.num_workers))
    if exact and device.type == "cpu" and (gain := bf16_gain()) >= WORTH_IT:
        console.print(f"{bf16_told(gain)}, where the network is the bottleneck: trainer.precision=fastest.")
