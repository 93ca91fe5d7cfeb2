"""`selfsight stats`: sizes, channels, type, range, mean and standard deviation of the images of a data set."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from selfsight.datamodules.images.bands import TYPES, Bands, Kind, measuring
from selfsight.engine import build
from selfsight.engine.about_data import describe
from selfsight.runs.console import make_console, make_table
from selfsight.validation import NULL, expect, whole


def run(cfg: DictConfig) -> Bands:
    """Print the facts, and the words that make a run use them."""
    most = expect("images", cfg.images, NULL | whole(1))
    data = build.dataset(cfg)
    found = measuring(data.train, most)
    facts = found.result(Kind(3, "uint8") if data.bands is None else data.bands.kind)
    console = make_console()
    console.print(
        f"{describe(data)}: {facts.kind}, {facts.low:g} to {facts.high:g}; of {facts.images:,} images", markup=False
    )
    console.print(f"width × height: {told_sizes(found.sizes)}", markup=False)
    channels = enumerate(zip(facts.mean, facts.std, strict=True), start=1)
    rows = ([str(channel), f"{mean:.6g}", f"{std:.6g}"] for channel, (mean, std) in channels)
    console.print(make_table("channel", "mean", "std", rows=rows))
    console.print(f"where 1 is {TYPES[facts.kind.dtype]:,}; to have these:", style="dim", markup=False)
    words = (",".join(f"{value:.6g}" for value in values) for values in (facts.mean, facts.std))
    console.print("  dataset.mean=[{}] dataset.std=[{}]".format(*words), style="dim", markup=False, soft_wrap=True)
    return facts


def told_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """``500 × 375``, or where they differ ``from 32 × 48 to 1024 × 768, in the middle 500 × 375`` by their pixels."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    least, middle, most = ("{} × {}".format(*ordered[i]) for i in (0, len(ordered) // 2, -1))
    return least if least == most else f"from {least} to {most}, in the middle {middle}"
