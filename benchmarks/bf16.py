"""Whether a training in bf16-mixed ends where one in float32 does: kNN on the digits, within the noise of the seeds.

    python benchmarks/bf16.py --seeds 3 --epochs 20

Both precisions train with the same seeds by our command. The status is 1 where their means lie further apart than
`MOST` times the standard deviation of a difference of such means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PRECISIONS = ("32-true", "bf16-mixed")
MOST = 3.0
FINEST = 1 / 360  #: an image of the test set, below which a spread is chance


def trained(precision: str, seed: int, epochs: int, width: int, place: Path) -> float:
    """kNN of a run, of 360 test images."""
    name = f"{precision}-{seed}"
    words = [
        "pretrain", f"seed={seed}", f"trainer.precision={precision}", f"trainer.max_epochs={epochs}",
        f"backbone.width={width}", "evaluator.online.every=1000000", "report=false", f"runs={place}", f"name={name}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "selfsight", *words], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((place / name / "summary.json").read_text())["pretrained"]["knn_top1"])


def apart(found: dict[str, list[float]]) -> float:
    """Distance of the two means, in standard deviations of it."""
    exact, half = (found[precision] for precision in PRECISIONS)
    spread = math.sqrt(sum(max(statistics.stdev(of), FINEST) ** 2 / len(of) for of in (exact, half)))
    return abs(statistics.mean(exact) - statistics.mean(half)) / spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=16, help="of resnet_digits")
    asked = parser.parse_args()
    if asked.seeds < 2:
        sys.exit(f"--seeds {asked.seeds}: a spread takes two seeds or more.")
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(asked.seeds):
            for precision in PRECISIONS:
                found[precision].append(trained(precision, seed, asked.epochs, asked.width, Path(place)))
                print(f"{precision:<10} seed {seed}: kNN {found[precision][-1]:.1%}", flush=True)
    for precision, of in found.items():
        print(f"{precision:<10} {statistics.mean(of):.1%} ± {statistics.stdev(of):.1%}")
    distance = apart(found)
    print(f"the means are {distance:.1f} standard deviations of their difference apart, {MOST:g} are let pass")
    sys.exit(distance > MOST)


if __name__ == "__main__":
    main()
