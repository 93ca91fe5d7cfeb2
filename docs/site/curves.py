"""The curves of `docs/curves.md`: short runs on the digits, some right and some not, and what they wrote.

    python docs/site/curves.py        trains into build/curves what is not there yet, draws docs/images/curves/*.svg

A run takes less than a minute of one core; on the same machine the same command draws the same curve.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import svg

ROOT = Path(__file__).parents[2]
FOLDER, RUNS = ROOT / "docs" / "images" / "curves", ROOT / "build" / "curves"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 236, 168, 40, 8, 28, 26
#: the same of every run: no page, nothing measured at the end
QUIET = ("report=false", "evaluator.final={}")

#: name: words of `selfsight pretrain`
TRAININGS: dict[str, str] = {
    "simclr": "trainer.max_epochs=8",
    "simsiam": "recipe=digits/simsiam trainer.max_epochs=8",
    "swav": "recipe=digits/swav trainer.max_epochs=8",
    "swav-stuck": "recipe=digits/swav method.epsilon=0.05 trainer.max_epochs=8",
    "byol": "method=byol trainer.max_epochs=8",
    "byol-collapse": "method=byol optimizer=adamw optimizer.lr=0.3 trainer.max_epochs=8",
    "swav-live": "recipe=digits/swav batch_size=16 trainer.max_epochs=6",
    "swav-dead": "recipe=digits/swav batch_size=16 method.num_prototypes=1000 method.epsilon=0.05 trainer.max_epochs=6",
    "fixmatch": "method=fixmatch labels.per_class=1 steps_per_epoch=15 trainer.max_epochs=8",
    "fixmatch-dominated": "method=fixmatch labels.per_class=1 method.tau=0.0 method.da_m=null method.lambda_u=20 "
    "steps_per_epoch=15 trainer.max_epochs=8",
}
#: picture: its runs, the right one first; columns of metrics.csv with their titles
PICTURES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "simclr": (("simclr",), {"loss": "SimCLR: loss", "knn_top1": "SimCLR: kNN", "rank": "SimCLR: rank"}),
    "simsiam": (
        ("simsiam",),
        {"loss": "SimSiam: loss", "knn_top1": "SimSiam: kNN", "projection_std": "projection_std"},
    ),
    "stuck": (("swav", "swav-stuck"), {"loss": "loss", "code_softness": "code_softness", "knn_top1": "kNN"}),
    "collapse": (("byol", "byol-collapse"), {"loss": "loss", "rank": "rank", "knn_top1": "kNN"}),
    "dead": (
        ("swav-live", "swav-dead"),
        {"live_prototypes": "live_prototypes", "code_entropy": "code_entropy", "knn_top1": "kNN"},
    ),
    "dominated": (
        ("fixmatch", "fixmatch-dominated"),
        {"mask_rate": "mask_rate", "pseudo_label_accuracy": "pseudo_label_accuracy", "student_top1": "test accuracy"},
    ),
}

#: column: what its axis has to reach, so that a wobble looks like one
AXES = {
    "rank": (0.0,),
    "knn_top1": (0.8, 1.0),
    "student_top1": (0.0, 1.0),
    **dict.fromkeys(
        ("projection_std", "code_softness", "code_entropy", "live_prototypes", "mask_rate", "pseudo_label_accuracy"),
        (0.0, 1.0),
    ),
}


def train(name: str) -> None:
    """Do a run that has not been done."""
    if len(rows(name)) and (RUNS / name / "summary.json").is_file():
        return
    command = [
        sys.executable,
        "-c",
        "from selfsight.cli import main; main()",
        "pretrain",
        *TRAININGS[name].split(),
        *QUIET,
    ]
    RUNS.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, f"name={name}", f"runs={RUNS}"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows(name: str) -> list[dict[str, str]]:
    path = RUNS / name / "metrics.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []


def column(name: str, key: str) -> list[float]:
    """A figure by epoch; where an epoch lacks it, nothing."""
    return [float(row[key]) if row.get(key) else math.nan for row in rows(name)]


def panel(title: str, key: str, lines: Sequence[tuple[str, str]]) -> str:
    """One figure of one or two runs, each with its colour."""
    values = {name: column(name, key) for name, _ in lines}
    known = [value for found in values.values() for value in found if not math.isnan(value)]
    guess = column(lines[0][0], "chance")[0] if key == "loss" and rows(lines[0][0])[0].get("chance") else None
    low, high = span([*known, *([] if guess is None else [guess]), *AXES.get(key, ())])
    length = max(map(len, values.values()))

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * i / max(1, length - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    body = [svg.text(LEFT, 12, title, anchor="start", size=12.5)]
    for tick in (low, (low + high) / 2, high):
        body.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="var(--line)" stroke-width="1"/>')
        body.append(svg.text(LEFT - 5, y(tick), f"{tick:.3g}", "soft", "end", 10.5))
    body += [svg.text(x(i), HEIGHT - 14, str(i + 1), "soft", size=10.5) for i in (0, length - 1)]
    body.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "epoch", "soft", size=10.5))
    if guess is not None:
        body.append(
            f'<path d="M{LEFT} {y(guess):.1f}H{WIDTH - RIGHT}" stroke="var(--soft)" stroke-width="1.4" '
            'stroke-dasharray="2 3"/>' + svg.text(WIDTH - RIGHT, y(guess) - 7, "guessing", "soft", "end", 10.5)
        )
    for name, colour in lines:
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values[name]) if not math.isnan(value))
        dashes = ' stroke-dasharray="6 3"' if colour == "bad" else ""
        body.append(f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="2.2"{dashes}/>')
    said = " and ".join(f"{name}: {values[name][0]:.3g} to {values[name][-1]:.3g}" for name, _ in lines)
    return svg.document(WIDTH, HEIGHT, f"{title} by epoch; {said}", "\n".join(body), 12)


def span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of an axis, at whole steps of a size that suits them."""
    low, high = min(values), max(values)
    step = 10 ** math.floor(math.log10(max(high - low, 1e-3))) / 2
    return math.floor(round(low / step, 6)) * step, math.ceil(round(high / step, 6)) * step


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in TRAININGS:
        train(name)
    for picture, (runs, columns) in PICTURES.items():
        lines = list(zip(runs, ("good", "bad"), strict=False))
        for key, title in columns.items():
            (FOLDER / f"{picture}-{key}.svg").write_text(panel(title, key, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
