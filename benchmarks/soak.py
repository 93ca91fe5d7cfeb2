"""Kills trainings at random moments until they have come to their end, and holds them against those that never stopped.

python benchmarks/soak.py --methods swav pixpro --kills 4 --seed 1

Every run is started by the same command with ``resume=auto`` and killed by SIGKILL: as soon as it has a folder, at a
random moment between two checkpoints, during an evaluation, or while a checkpoint is being written. Which engine makes
the views and how many workers read is drawn for each method. In the end weights and metrics have to be those of the run
that nothing happened to, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from selfsight.composition.catalogue import choices, defaults, file
from selfsight.datamodules.loading.loader import cores
from selfsight.runs.folder import RunFolder

MOMENTS = ("beginning", "between checkpoints", "evaluating", "writing a checkpoint")
ENGINES, WORKERS = ("cpu", "device"), (0, 2)
SETTINGS = (
    "debug=smoke",
    "report=false",
    "evaluator.final={}",
    "trainer.max_epochs=6",
)
#: columns of metrics.csv that tell of the clock, or of the views since the last start
PASSING = {"seconds", "images_per_second", "data_wait_share", "alignment", "uniformity", "view_knn_top1"}
#: the command, which leaves a mark beside its folder where an evaluation begins
MARKING = """
import pathlib, sys
from selfsight import cli
from selfsight.evaluation import OnlineEvaluation
mark, sys.argv[:] = pathlib.Path(sys.argv[1]), ["selfsight", *sys.argv[2:]]
evaluate = OnlineEvaluation._evaluate
OnlineEvaluation._evaluate = lambda *given: (mark.touch(), evaluate(*given))
cli.main()
"""
PATIENCE = 600.0  # seconds until a process that should have ended or written something is given up


def command(runs: Path, name: str, method: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """The training, begun or gone on with."""
    typed = ["pretrain", f"method={method}", *SETTINGS, *words, f"runs={runs}", f"name={name}", "resume=auto"]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other sums would differ in the last bit
    return subprocess.Popen(
        [sys.executable, "-c", MARKING, runs / f"{name}.mark", *typed],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=threads,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has come to its end.

    Raises:
        RuntimeError: it did not; with what it said.
    """
    said = process.communicate(timeout=PATIENCE)[0].decode(errors="replace")
    if process.returncode:
        raise RuntimeError(said)


def kill(process: subprocess.Popen[bytes], folder: RunFolder, moment: str, draw: random.Random) -> bool:
    """Kill a training at this moment; False where it has come to its end before."""
    place, before, mark = folder.checkpoint.parent, written(folder), folder.path.with_suffix(".mark")
    mark.unlink(missing_ok=True)
    deadline, wait = time.monotonic() + PATIENCE, 0.0
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "beginning" and folder.has_config:
            break
        if moment == "evaluating" and mark.exists():
            break
        if moment == "writing a checkpoint" and any(place.glob(".last.ckpt.*")):
            break
        if moment == "between checkpoints" and written(folder) != before:
            wait = draw.uniform(0, 0.5)
            break
        time.sleep(0.001)
    time.sleep(wait)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def written(folder: RunFolder) -> int:
    """When the last checkpoint was written; 0 before the first."""
    return folder.checkpoint.stat().st_mtime_ns if folder.checkpoint.exists() else 0


def differences(folder: RunFolder, whole: RunFolder) -> list[str]:
    """In what a run has come to another end than the one that nothing happened to."""
    found, expected = (torch.load(f.checkpoint, weights_only=True)["state_dict"] for f in (folder, whole))
    wrong = [key for key in expected if key not in found or not torch.equal(found[key], expected[key])]
    rows, expected_rows = (
        [{k: v for k, v in row.items() if k not in PASSING} for row in f.read_metrics()] for f in (folder, whole)
    )
    return [*wrong, *(["metrics.csv"] if rows != expected_rows else [])]


def soak(
    runs: Path, method: str, kills: int, draw: random.Random, words: Sequence[str] = ()
) -> tuple[Counter[str], int]:
    """Kill a training of this method so many times, and let it come to its end.

    Returns:
        How often it was killed at which moment, and in how many things it ended otherwise (0: nothing was lost).
    """
    whole, folder = RunFolder(runs / f"{method}-whole"), RunFolder(runs / f"{method}-killed")
    ended(command(runs, whole.name, method, words))
    injected: Counter[str] = Counter()
    for _ in range(kills):
        moment = draw.choice(MOMENTS) if injected else MOMENTS[0]
        if kill(command(runs, folder.name, method, words), folder, moment, draw):
            injected[moment] += 1
    ended(command(runs, folder.name, method, words))
    return injected, len(differences(folder, whole))


def learns_from_few_labels(method: str) -> bool:
    """Whether a choice of the group takes labels of some images only."""
    return any(default == ("datamodule", "semi") for default in defaults(file("method", method)))


def needed(method: str, runs: Path) -> list[str]:
    """Words without which a method does not begin on the images of debug=smoke; distillation has a teacher trained."""
    if method == "distillation":
        ended(command(runs, "teacher", "simsiam", ["trainer.max_epochs=1"]))
        return [f"method.teacher={runs / 'teacher'}"]
    if learns_from_few_labels(method):
        return ["labels.per_class=1"]
    return {"mae": ["backbone=vit_digits"], "deepclusterv2": ["method.num_prototypes=[4,4,4]"]}.get(method, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="choices of the group; none: all")
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=cores(), help="trainings beside one another")
    parser.add_argument("--words", nargs="*", default=[], help="further words of the command, such as num_workers=2")
    options = parser.parse_args()
    methods = options.methods or choices("method")
    lost, total = 0, Counter[str]()

    def one(method: str) -> tuple[Counter[str], bool, str]:
        draw = random.Random(f"{options.seed} {method}")
        how = f"views.engine={draw.choice(ENGINES)}", f"num_workers={draw.choice(WORKERS)}"
        with tempfile.TemporaryDirectory() as place:
            try:
                words = [*needed(method, Path(place)), *how, *options.words]
                injected, wrong = soak(Path(place), method, options.kills, draw, words)
            except RuntimeError as error:
                return Counter(), True, f"{method:16} {' '.join(how)}: did not come to its end: {error}"
        told = ", ".join(f"{count} {moment}" for moment, count in injected.items())
        end = "lost" if wrong else "bit-equal"
        return injected, wrong > 0, f"{method:16} {' '.join(how)}: killed {injected.total()} ({told}); {end}"

    with ThreadPoolExecutor(options.at_once) as pool:
        for injected, wrong, told in pool.map(one, methods):
            total += injected
            lost += wrong
            print(told, flush=True)
    kinds = ", ".join(f"{n} {moment}" for moment, n in total.items())
    survived = len(methods) - lost
    print(f"injected {total.total()} ({kinds}); trainings survived {survived} of {len(methods)}, lost {lost}")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
