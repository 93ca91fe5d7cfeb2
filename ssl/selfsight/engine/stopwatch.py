"""Where the time of a training step goes, part by part, and what holds it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback

from selfsight.contracts import Batch
from selfsight.datamodules.loading.reader import RawBatch

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
