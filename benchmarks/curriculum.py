"""Processor time of a training step in the stages of EfficientTrain, views and low-frequency crop included.

    python benchmarks/curriculum.py --method simsiam --backbone resnet18 --image-size 224 --batch-size 8 --steps 3

Sizes take turns, one warm-up step each; medians. The last line is the share of a plain run's time that all stages take,
by their epochs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from selfsight.composition.overrides import compose
from selfsight.engine import build
from selfsight.engine.one_step import step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="simsiam")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    words = [
        "dataset=digits", f"method={asked.method}", f"backbone={asked.backbone}", "debug=smoke", "views.engine=device",
        f"dataset.image_size={asked.image_size}", f"batch_size={asked.batch_size}", "trainer.max_epochs=5",
    ]  # fmt: skip
    torch.set_num_threads(1)
    parts = build.parts(compose("pretrain", [*words, "callbacks=efficienttrain"]))
    parts.method.configure(parts.recipe, parts.length)
    data: Any = parts.datamodule
    print(parts.callbacks[0].about)  # type: ignore[attr-defined]
    spent: dict[int, list[float]] = {}
    for turn in range(asked.steps + 1):
        for epoch in (0, 3, 4):
            begun = time.process_time()
            batch = data.on_after_batch_transfer(next(iter(data.train_dataloader().from_epoch(epoch))), 0)
            step(parts.method, batch)
            if turn > 0:
                spent.setdefault(epoch, []).append(time.process_time() - begun)
    seconds = {epoch: statistics.median(of) for epoch, of in spent.items()}
    for epoch, of in seconds.items():
        side = data.curriculum.side(asked.image_size, epoch)
        print(f"{side:4} pixels: {of:.2f} s a step, {of / seconds[4]:.0%}")
    by_epoch = [seconds[epoch] for epoch in (0, 0, 0, 3, 4)]
    print(f"all five stages: {sum(by_epoch) / (5 * seconds[4]):.0%} of the time without")


if __name__ == "__main__":
    main()
