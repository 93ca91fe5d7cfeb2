"""Trains for many steps and watches the process: its memory, its open files, its children. None of them may grow.

python benchmarks/steady.py --methods swav simsiam --steps 2000

Samples are taken from /proc (Linux) every half second. The median of the last fifth of a training is compared with
that of the second fifth, when everything has been made: more than 2 % more memory, or more files or processes at all,
is growth.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from selfsight.composition.catalogue import choices
from selfsight.datamodules.loading.loader import cores

from soak import learns_from_few_labels, needed  # isort: skip  # beside this file

MOST = 1.02  # of the memory after the warm-up
SETTINGS = (
    "debug=smoke", "report=false", "evaluator.final={}", "trainer.limit_batches=100", "trainer.checkpoint_every=2",
    "evaluator.online.every=2", "limit_images=512",
)  # fmt: skip


class Sample(NamedTuple):
    """What a process holds: resident memory in MiB, open files, processes it has started."""

    memory: float
    files: float
    children: float


def sample(pid: int) -> Sample | None:
    """None of a process that is no more."""
    place = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        tasks = [task for task in (place / "task").iterdir() if (task / "children").is_file()]
        children = sum(len((task / "children").read_text().split()) for task in tasks)
        return Sample(int(status["VmRSS"].split()[0]) / 1024, len(list((place / "fd").iterdir())), children)
    except (OSError, KeyError):
        return None


def watch(runs: Path, method: str, steps: int, words: list[str]) -> list[Sample]:
    """The samples of a training's steps.

    Raises:
        RuntimeError: it has not come to its end; with what it said.
    """
    epoch = ["steps_per_epoch=100"] if learns_from_few_labels(method) else []
    typed = ["pretrain", f"method={method}", *SETTINGS, *epoch, f"trainer.max_steps={steps}", f"runs={runs}"]
    said, found = runs / "said.txt", []
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfsight.cli", *typed, *words, "name=run"], stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if (runs / "run" / "metrics.csv").exists() and (one := sample(process.pid)) is not None:
                found.append(one)
            time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(said.read_text())
    return found


def growth(samples: list[Sample]) -> tuple[Sample, Sample]:
    """Medians of the second fifth and of the last one.

    Raises:
        ValueError: there are too few samples to say.
    """
    fifth = len(samples) // 5
    if fifth < 3:
        raise ValueError(f"{len(samples)} samples are too few to compare; train for more steps")
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return tuple(Sample(*map(statistics.median, zip(*part, strict=True))) for part in (early, late))  # type: ignore[return-value]


def grew(early: Sample, late: Sample) -> bool:
    """Whether anything has become more than it may."""
    return late.memory > MOST * early.memory or late.files > early.files or late.children > early.children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="choices of the group; none: all")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--words", nargs="*", default=[], help="further words of the command, such as num_workers=2")
    parser.add_argument("--at-once", type=int, default=cores(), help="trainings beside one another")
    options, wrong = parser.parse_args(), 0
    methods = options.methods or choices("method")

    def one(method: str) -> tuple[bool, str]:
        with tempfile.TemporaryDirectory() as place:
            try:
                words = [*needed(method, Path(place)), *options.words]
                early, late = growth(watch(Path(place), method, options.steps, words))
            except (RuntimeError, ValueError) as error:
                return True, f"{method:16} did not come to its end: {error}"
        return grew(early, late), (
            f"{method:16} {options.steps} steps: {early.memory:.1f} → {late.memory:.1f} MiB "
            f"({late.memory / early.memory - 1:+.2%}), files {early.files:g} → {late.files:g}, processes "
            f"{early.children:g} → {late.children:g}; {'grew' if grew(early, late) else 'steady'}"
        )

    with ThreadPoolExecutor(options.at_once) as pool:
        for more, told in pool.map(one, methods):
            wrong += more
            print(told, flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
