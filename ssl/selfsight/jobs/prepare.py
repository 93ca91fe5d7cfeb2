"""`selfsight prepare`: a folder of images, made ready to be read fast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfsight.datamodules.datasets.checks import path
from selfsight.datamodules.datasets.preparing import Preparation
from selfsight.datamodules.datasets.unreadable import too_many
from selfsight.datamodules.loading.loader import cores
from selfsight.errors import UserError
from selfsight.runs.console import make_console
from selfsight.validation import AUTO, NULL, SHARE, expect, one_of, whole

SETTINGS = {
    "encode": one_of("jpeg", "raw", "tar"),
    "shortest": NULL | whole(1, 65_500),
    "quality": whole(1, 100),
    "per_shard": whole(1, 10**9),
}


def run(cfg: DictConfig) -> None:
    """Make ``out`` from ``source``. Every part is whole or absent, so that a stopped command can be repeated."""
    source, out = path("source", cfg.source), path("out", cfg.out)
    settings, tolerated = checked(cfg, source, out), expect("max_unreadable", cfg.max_unreadable, SHARE)
    workers = expect("workers", cfg.workers, AUTO | whole(1))
    preparation = Preparation(source, out, settings, expect("max_pixels", cfg.max_pixels, whole(1)))
    try:
        preparation.begin()
    except OSError as error:
        raise UserError(f"'{out}' cannot be made ({error.strerror}); name a folder you may write.") from None
    console = make_console()
    try:
        unreadable = make(preparation, cores() if workers == "auto" else workers, console)
        images = len(preparation.paths)
        if too_many(len(unreadable), tolerated, images):
            name, reason = next(iter(unreadable.items()))
            raise UserError(
                f"{len(unreadable)} of {images} files cannot be read as images, such as '{name}' ({reason}): "
                f"remove them, or tolerate a larger share with max_unreadable (now {tolerated:g})."
            )
        size = preparation.finish(unreadable)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}); repeat the command with more space.") from None
    if preparation.reduced:
        kinds = ", ".join(f"{count:,} of {kind}" for kind, count in preparation.reduced.items())
        console.print(f"reduced to RGB of 8 bits: {kinds}; encode=tar keeps files as they are", markup=False)
    if preparation.left_out:
        console.print(f"left out: {preparation.left_out}", style="dim", markup=False)
    console.print(
        f"{images - len(unreadable):,} images, {preparation.bytes / 2**20:,.1f} → {size / 2**20:,.1f} MiB: "
        f"selfsight pretrain dataset=folder dataset.root={out}"
    )


def checked(cfg: DictConfig, source: Path, out: Path) -> dict[str, object]:
    """The settings, each a value that can be worked with."""
    if not source.is_dir():
        raise UserError(f"source is '{source}', which is no folder; name a folder of images.")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"out is '{out}', inside the source, where it would be taken for images; name another folder.")
    return {key: expect(key, cfg[key], kind) for key, kind in SETTINGS.items()}


def make(preparation: Preparation, workers: int, console: Console) -> dict[str, str]:
    """All parts, several at a time; the files that cannot be read, with the reason."""
    unreadable: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images are the parallelism
    columns = [TextColumn("preparing"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()]
    try:
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            task = bar.add_task("preparing", total=len(preparation.paths))
            jobs = [pool.submit(preparation.make, number) for number in range(len(preparation.parts))]
            try:
                for job, part in zip(jobs, preparation.parts, strict=True):
                    unreadable |= job.result()
                    bar.advance(task, len(part))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
    return unreadable
