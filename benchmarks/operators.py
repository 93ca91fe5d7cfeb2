"""Where the time of a training step goes, by kinds of operations: torch's profiler on one step after a few others.

    python benchmarks/operators.py --methods simclrv2 swav pixpro simmatchv2 spark --sizes 32 96
    python benchmarks/operators.py --methods simmatchv2 --sizes 32 --named one_hot     # the share of some of them

Shares are of the CPU time that operations take themselves, on one thread, views not included. ResNet-18 with the stem
of CIFAR up to 32 pixels and ImageNet's above; SparK has a ResNet-50, packed, and nothing to hide below 64 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfsight.composition.overrides import compose
from selfsight.engine import build
from selfsight.engine.one_step import step

#: kind of operations: parts of their names in torch, the first kind that fits
KINDS = {
    "convolutions": ("conv",),
    "batch norm": ("batch_norm",),
    "matrix products": ("mm", "matmul", "linear", "dot"),
    "copies, sums, activations": (
        "copy", "clone", "cat", "add", "sum", "mul", "relu", "threshold", "pool", "fill", "zero", "contiguous", "div",
        "sub", "where", "index", "clamp",
    ),
}  # fmt: skip
REST = "everything else"
LEAST = 64  #: side below which SparK has one cell
WARM = 2


def stepping(method: str, size: int, batch: int) -> Callable[[], Tensor]:
    """A training step of a method on images of random views, again and again the same."""
    deep = "resnet50" if method == "spark" else "resnet18"
    stem = "cifar" if size <= 32 else "imagenet"
    words = [
        f"method={method}", f"backbone={deep}", f"backbone.stem={stem}", "dataset=digits", "num_workers=0",
        f"dataset.image_size={size}", "trainer.accelerator=cpu", "report=false",
    ]  # fmt: skip
    few = compose("pretrain", words).get("mu") is not None
    words += [f"batch_size={batch // 4}", "mu=7", "labels.per_class=4"] if few else [f"batch_size={batch}"]
    parts = build.parts(compose("pretrain", words))
    parts.method.configure(parts.recipe, parts.length)
    loaded = next(iter(parts.datamodule.train_dataloader()))
    drawn = parts.datamodule.on_after_batch_transfer(loaded, 0)
    return lambda: step(parts.method, drawn)


def shares(work: Callable[[], object], named: Sequence[str] = ()) -> dict[str, float]:
    """Of the time of all operations, by kind; of those whose names have ``named`` in them, apart."""
    for _ in range(WARM):
        work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        work()
    kinds = {f"'{part}'": (part,) for part in named} | KINDS
    spent = dict.fromkeys([*kinds, REST], 0.0)
    for event in found.key_averages():
        fits = (kind for kind, parts in kinds.items() if any(part in event.key for part in parts))
        spent[next(fits, REST)] += event.self_cpu_time_total
    return {kind: value / sum(spent.values()) for kind, value in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["simclrv2", "swav", "pixpro", "simmatchv2", "spark"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 96])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--named", nargs="*", default=[], help="operations to be shown apart, by parts of their names")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for method in asked.methods:
        for size in asked.sizes:
            if method == "spark" and size < LEAST:
                print(f"{method}, {size} pixels: left out, one cell is all there is", flush=True)
                continue
            found = shares(stepping(method, size, asked.batch), asked.named)
            print(
                f"{method}, {size} pixels: " + ", ".join(f"{kind} {of:.1%}" for kind, of in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
