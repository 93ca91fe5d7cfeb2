"""`selfsight stats`: channels, type, range, mean and standard deviation of the images of a data set."""

from __future__ import annotations

from omegaconf import DictConfig

from selfsight.datamodules.images.bands import TYPES, Bands, Kind, measure
from selfsight.engine import build
from selfsight.engine.measure import describe
from selfsight.runs.console import make_console, make_table, quiet
from selfsight.validation import NULL, expect, whole


def run(cfg: DictConfig) -> Bands:
    """Print the facts, and the words that make a run use them."""
    quiet()
    most = expect("images", cfg.images, NULL | whole(1))
    data = build.dataset(cfg)
    facts = measure(data.train, Kind(3, "uint8") if data.bands is None else data.bands.kind, most)
    console = make_console()
    console.print(
        f"{describe(data)}: {facts.kind}, {facts.low:g} to {facts.high:g}; of {facts.images:,} images", markup=False
    )
    table = make_table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(facts.mean, facts.std, strict=True), start=1):
        table.add_row(str(channel), f"{mean:.6g}", f"{std:.6g}")
    console.print(table)
    console.print(f"where 1 is {TYPES[facts.kind.dtype]:,}; to have these:", style="dim", markup=False)
    words = (",".join(f"{value:.6g}" for value in values) for values in (facts.mean, facts.std))
    console.print("  dataset.mean=[{}] dataset.std=[{}]".format(*words), style="dim", markup=False, soft_wrap=True)
    return facts
