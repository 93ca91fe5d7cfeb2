"""From a folder of JPEGs to an embedding: our command against what one would write instead, whole trainings in turn.

The same network, batch, loss, optimiser, views and number of steps on every side (`CASES`; the peers are in `sides`),
each training in a process of its own, so that start-up, workers and memory count, all on the CPU. As many threads as
there are cores, and for the peers as many readers; ours by its own choice, which keeps a folder as small as these in
memory, decoded, and needs none. The first step of each does not count. Quality: kNN of the backbone after equal time,
start-up included.

    make bench ARGS="--only end_to_end"
    .venv-bench/bin/python benchmarks/end_to_end.py --cases simclr32 --images DIR --minutes 3
    .venv-bench/bin/python benchmarks/end_to_end.py --small     # a tiny network for two steps: shows that it runs

DIR has class folders, or ``train`` and ``test`` with class folders in them; without it fractals are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from watch import LAUNCHED

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  #: that run.py sets to 1 for itself
TRAIN, TEST, CLASSES, DRAWN = 1280, 1000, 10, 128  #: images of the folder, made up or taken from a larger one
LEAST = 2  #: batches that a folder has to hold
BF16_UNITS = ("amx_bf16", "avx512_bf16")  #: the first is what the goals are for
SUFFIXES = (".jpg", ".jpeg")

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        words: what our command is told besides sizes and folder.
        peers: side: the goal of ours against it, a ratio of images a second; None: none.
        quality: also train for equal time and measure, against lightly.
        bf16: goal of ours in bf16-mixed against lightly in float32 on a CPU with AMX; None: not run.
    """

    name: str
    method: str
    backbone: str
    stem: str
    size: int
    batch: int
    words: tuple[str, ...]
    peers: dict[str, float | None]
    quality: bool = False
    bf16: float | None = None


SIMCLR = (
    "method.projection_layers=2", "method.temperature=0.5", "method.reduction=mean_2n",
    "optimizer=sgd", "optimizer.lr=0.06", "optimizer.momentum=0", "optimizer.weight_decay=0",
)  # fmt: skip
CASES = {
    case.name: case
    for case in (
        Case(
            "simclr32", "simclrv2", "resnet18", "cifar", 32, 128,
            (*SIMCLR, "views=swav_small", "views.global.scale=[0.08,1.0]"),
            {"lightly": 1.2, "loop": None}, quality=True, bf16=2.5,
        ),
        Case(
            "simclr96", "simclrv2", "resnet18", "imagenet", 96, 64,
            (*SIMCLR, "views=swav_small", "views.global.scale=[0.08,1.0]", "views.global.jitter=[0.8,0.8,0.8,0.2]",
             "++views.global.blur=0.5", "++views.global.blur_kernel=pillow"),
            {"lightly": None},
        ),
        Case(
            "multicrop96", "swav", "resnet18", "imagenet", 96, 64,
            ("method.hidden_dim=512", "method.num_prototypes=512", "method.freeze_prototypes_steps=0",
             "views.global.blur_kernel=pillow", "views.local.blur_kernel=pillow",
             "optimizer=adam", "optimizer.lr=0.001", "optimizer.weight_decay=0"),
            {"lightly": 1.5}, quality=True, bf16=1.5,
        ),
        Case(
            "spark128", "spark", "resnet50", "imagenet", 128, 16,
            ("optimizer=adamw", "optimizer.lr=2e-4", "optimizer.weight_decay=0.01"),
            {"official": None},
        ),
    )
}  # fmt: skip
#: of `make bench`; simclr96 is run when it is asked for
USUAL = ("simclr32", "multicrop96", "spark128")


def run(
    images: str | None, rounds: int, minutes: float, steps: int = 5, cases: Sequence[Case] | None = None
) -> list[dict[str, Any]]:
    """Rows as `run.rows` has them, with all figures of both sides under ``sides``.

    Args:
        images: folder of JPEG files; None: drawn.
        rounds: turns of every side. minutes: of each training whose quality is measured; 0: none is.
        steps: of the trainings that are only timed, the first of which does not count.
    """
    cases = [CASES[name] for name in USUAL] if cases is None else cases
    for sentence in left_out(cases):
        print(sentence, flush=True)
    found = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        classes = taken(Path(images), root) if images else drawn(root)
        most = len(list((root / "train").rglob("*.*")))
        for case in cases:
            if most < LEAST * case.batch:
                print(
                    f"{case.name} is left out: the folder holds {most} JPEG files to train on, and {LEAST} batches of "
                    f"{case.batch} need {LEAST * case.batch}.",
                    flush=True,
                )
                continue
            found += of_case(case, root, Path(place), rounds, steps, 60 * minutes * (classes > 1))
        if minutes and classes < 2 and any(case.quality for case in cases):
            print("the quality is not measured: the images lie in no class folders, and kNN needs labels.", flush=True)
    return found


def left_out(cases: Sequence[Case]) -> list[str]:
    """What cannot be measured on this machine, a sentence each."""
    sentences = []
    names = [f"e2e_{case.name}_lightly" for case in cases if "lightly" in case.peers]
    if names and not has_lightly():
        sentences.append(
            f"lightly is not installed here: {', '.join(names)} and the quality are left out; `make bench` installs it."
        )
    if any(case.bf16 for case in cases) and bf16_unit() is None:
        sentences.append("this CPU does not multiply in bfloat16 (AMX, AVX-512 BF16): the bf16 rows are left out.")
    if cores() == 1:
        sentences.append(
            "this machine has one core, and goals are for two: nobody reads beside the training (num_workers=0)."
        )
    return sentences


def has_lightly() -> bool:
    return find_spec("lightly") is not None


def bf16_unit() -> str | None:
    """What the CPU multiplies bfloat16 with, as Linux calls it: whole matrices, vectors, or nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return next((unit for unit in BF16_UNITS if unit in told), None)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- images ----------------------------------------------------------------------------------------------------------


def drawn(root: Path, train: int = TRAIN, test: int = TEST) -> int:
    """Fractals of `CLASSES` systems as JPEG files below ``root``; the number of classes."""
    from PIL import Image

    from selfsight.datamodules import fractals

    data = fractals(systems=CLASSES, train=train, test=test, image_size=DRAWN)
    for part, images in (("train", data.train), ("test", data.test)):
        for number, label in enumerate(images.labels):
            folder = root / part / f"{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.read(number)).save(folder / f"{number:05}.jpg", quality=90)
    return CLASSES


def taken(source: Path, root: Path) -> int:
    """Links below ``root`` to as many of a folder's JPEG files, drawn at random; the number of classes."""
    parts = {part: source / part for part in ("train", "test")}
    apart = all(folder.is_dir() for folder in parts.values())
    files = {part: jpegs(folder) for part, folder in parts.items()} if apart else {"train": jpegs(source)}
    if not files["train"]:
        sys.exit(f"'{source}' holds no JPEG files; name another folder, or leave --images out.")
    for listed in files.values():
        random.Random(0).shuffle(listed)
    if not apart:
        held = min(TEST, len(files["train"]) // 5)
        files["test"], files["train"] = files["train"][:held], files["train"][held:]
    classes = set()
    for part, most in (("train", TRAIN), ("test", TEST)):
        base = parts[part] if apart else source
        for number, file in enumerate(files[part][:most]):
            inside = file.relative_to(base).parts
            classes.add(inside[0] if len(inside) > 1 else "")
            folder = root / part / (inside[0] if len(inside) > 1 else "all")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05}.jpg").symlink_to(file.resolve())
    return len(classes)


def jpegs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


# --- trainings -------------------------------------------------------------------------------------------------------


def of_case(case: Case, root: Path, place: Path, rounds: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case: every side ``rounds`` times in turn, then those whose quality is measured."""
    peers = [peer for peer in case.peers if peer != "lightly" or has_lightly()]
    unit = bf16_unit() if case.bf16 and "lightly" in peers else None
    sides = [*peers, "ours", *(["ours_bf16"] if unit else [])]
    times: dict[str, list[Figures]] = {side: [] for side in sides}
    checks = {peer: AGREE[peer](case) for peer in peers}
    for _ in range(rounds):
        for side in sides:
            times[side].append(train(case, side, root, place, steps=steps))
    middle = {side: medians(found) for side, found in times.items()}
    rows = [
        row(f"e2e_{case.name}_{peer}", middle["ours"], middle[peer], case.peers[peer], checks[peer]) for peer in peers
    ]
    if "loop" in peers:
        at_hand = {key.removeprefix("ready_"): value for key, value in middle["loop"].items() if "ready_" in key}
        of_loop = middle["loop"] | at_hand
        rows.append(row(f"e2e_{case.name}_ready", middle["ours"], of_loop, 0.97, "a loop on a batch that is there"))
    if unit:
        rows.append(
            row(f"e2e_{case.name}_bf16_lightly", middle["ours_bf16"], middle["lightly"],
                case.bf16 if unit == BF16_UNITS[0] else None, f"ours in bf16-mixed ({unit}), lightly in float32")
        )  # fmt: skip
    if case.quality and seconds and "lightly" in peers:
        rows += of_quality(case, ["lightly", "ours", *(["ours_bf16"] if unit else [])], root, place, seconds)
    return rows


def of_quality(case: Case, sides: Sequence[str], root: Path, place: Path, seconds: float) -> list[dict[str, Any]]:
    """The rows of trainings of equal time: every side of ours against the first one."""
    found = {side: quality(case, side, root, place, seconds) for side in sides}
    images = len(jpegs(root / "test"))
    chance = f"{images} test images, of which chance alone moves ±{math.sqrt(0.25 / images):.1%} at a half"
    peer, lasted = found.pop(sides[0]), f"after {seconds / 60:g} minutes"
    return [
        {
            "name": f"quality_{case.name}{side.removeprefix('ours')}_{sides[0]}",
            "ours": ours["knn"], "peer": peer["knn"],
            "ratio": round(ours["knn"] / peer["knn"], 3), "unit": "kNN top-1", "target": 1.0,
            "check": f"{lasted} and {ours['steps']:.0f} steps against {peer['steps']:.0f}; {chance}",
            "sides": {"ours": ours, "peer": peer},
        }
        for side, ours in found.items()
    ]  # fmt: skip


def row(name: str, ours: Figures, peer: Figures, target: float | None, check: str) -> dict[str, Any]:
    """One comparison: images a second, and the rest in words and under ``sides``."""
    pairs = {key: (ours[key], peer[key]) for key in ("cpu_image", "first_step", "wait")}
    told = "CPU {:.4f} and {:.4f} s an image; first step after {:.1f} and {:.1f} s; {:.0%} and {:.0%} between steps"
    return {
        "name": name, "ours": round(ours["images_s"], 2), "peer": round(peer["images_s"], 2), "unit": "images/s",
        "ratio": round(ours["images_s"] / peer["images_s"], 3),
        "cpu_ratio": round(peer["cpu_image"] / ours["cpu_image"], 3), "target": target,
        "memory_mib": [round(ours["peak_mib"]), round(peer["peak_mib"])],
        "check": f"{check}; {told.format(*(value for pair in pairs.values() for value in pair))}",
        "sides": {"ours": ours, "peer": peer},
    }  # fmt: skip


def medians(found: list[Figures]) -> Figures:
    return {key: statistics.median(figures[key] for figures in found) for key in found[0]}


def quality(case: Case, side: str, root: Path, place: Path, seconds: float) -> Figures:
    """The figures of a training of ``seconds``, and ``knn`` of its backbone."""
    weights = place / f"{case.name}-{side}.pt"
    figures = train(case, side, root, place, seconds=seconds, weights=weights)
    return figures | {"knn": knn(case, root, weights)}


def train(
    case: Case, side: str, root: Path, place: Path, steps: int | None = None, seconds: float | None = None,
    weights: Path | None = None, accelerator: str = "cpu",
) -> Figures:  # fmt: skip
    """One training in a process of its own; the peers have no other ``accelerator`` than the CPU."""
    file = place / "figures.json"
    readers = cores() if cores() > 1 else 0
    kept = str(weights) if weights else None
    if side.startswith("ours"):
        precision = "bf16-mixed" if side.endswith("bf16") else "32-true"
        words = [sys.executable, "-m", "selfsight", *our_words(case, root, place), f"trainer.precision={precision}"]
        words += [f"trainer.accelerator={accelerator}"]
        words += ["num_workers=0"] if not readers else []
        words += [f"trainer.max_steps={steps}"] if steps else ["trainer.max_epochs=1000000"]
        told = {"file": file, "batch": case.batch, "seconds": seconds, "weights": kept}
        words += ["callbacks.clock._target_=sides.Clock"]
        words += [f"callbacks.clock.{key}={value}" for key, value in told.items() if value is not None]
    else:
        sizes = {key: getattr(case, key) for key in ("method", "backbone", "stem", "size", "batch")}
        task = sizes | {"root": str(root), "file": str(file), "workers": readers, "steps": steps, "seconds": seconds}
        words = [sys.executable, str(HERE / "sides.py"), side, json.dumps(task | {"weights": kept})]
    environment = {key: value for key, value in os.environ.items() if key not in THREADS}
    environment |= {
        LAUNCHED: str(time.time()), "LIGHTLY_DID_VERSION_CHECK": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    done = subprocess.run(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{case.name}, {side}: the training failed.\n{done.stdout[-3000:]}")
    figures: Figures = json.loads(file.read_text())
    file.unlink()
    shutil.rmtree(place / "runs", ignore_errors=True)
    return figures


def our_words(case: Case, root: Path, place: Path) -> list[str]:
    """Our command, without what a run does at its end."""
    return [
        "pretrain", f"method={case.method}", f"backbone={case.backbone}", f"backbone.stem={case.stem}",
        "dataset=folder", f"dataset.root={root}", f"dataset.image_size={case.size}", f"batch_size={case.batch}",
        f"runs={place / 'runs'}", "schedule=constant", "presets=null", "report=false", "evaluator.final={}",
        "evaluator.online.every=1000000", *case.words,
    ]  # fmt: skip


# --- what is compared beforehand and afterwards ----------------------------------------------------------------------


def agree_lightly(case: Case) -> str:
    """The losses of ours and of lightly on the same projections or scores."""
    import torch
    from lightly.loss import NTXentLoss, SwaVLoss

    from selfsight.losses.swav import sinkhorn, swapped_prediction

    if case.method == "simclrv2":
        a, b = projections(case.batch)
        return agreed(our_contrast(a, b), NTXentLoss()(a, b), "the same projections")
    scores = torch.rand(8, case.batch, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = torch.stack([sinkhorn(s, epsilon=0.05, iterations=3) for s in scores[:2]])
    ours = swapped_prediction(scores, codes, [0, 1], temperature=0.1)
    return agreed(ours, SwaVLoss()(list(scores[:2]), list(scores[2:])), "the same scores")


def agree_loop(case: Case) -> str:
    import torch
    from sides import contrast

    a, b = projections(case.batch)
    return agreed(our_contrast(a, b), contrast(torch.cat([a, b])), "the same projections")


def agree_official(case: Case) -> str:
    """The losses of both ways of SparK with the same weights, images and mask."""
    import torch
    from spark import losses_of_both

    torch.manual_seed(0)
    return agreed(*losses_of_both("resnet18", 4, 64, 0.6, 64), "the same images, masks and weights of a ResNet-18")


AGREE = {"lightly": agree_lightly, "loop": agree_loop, "official": agree_official}


def projections(batch: int) -> Tensor:
    import torch

    return torch.randn(2, batch, 128, generator=torch.Generator().manual_seed(0))


def our_contrast(a: Tensor, b: Tensor) -> Tensor:
    from selfsight.losses.ntxent import ntxent

    return ntxent(a, b, temperature=0.5, reduction="mean_2n")


def agreed(ours: Tensor, peer: Tensor, on: str) -> str:
    assert abs(ours.item() / peer.item() - 1) < 1e-4, f"the losses differ: {ours.item()} and {peer.item()}"
    return f"losses {ours.item():.5f} and {peer.item():.5f} on {on}"


def knn(case: Case, root: Path, weights: Path) -> float:
    """kNN top-1 of the test images by frozen features, the same for every side."""
    import torch

    from selfsight.backbones.registry import create
    from selfsight.datamodules import ImageDataModule, folder
    from selfsight.datamodules.views.view import View
    from selfsight.engine.measure import features
    from selfsight.evaluation import KNN

    backbone = create(case.backbone, stem=case.stem)
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    data = ImageDataModule(folder(root, image_size=case.size), [View(size=case.size)], batch_size=case.batch)
    train, test = features(backbone, data)
    assert test is not None, "the folder has test images"
    return round(float(KNN()(train, test)["knn_top1"]), 4)


def small(case: Case) -> Case:
    return replace(case, backbone="resnet10_slim", stem="cifar", batch=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=USUAL)
    parser.add_argument("--images", default=None, help="folder of JPEG files; without it, fractals are drawn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=None, help="of trainings whose quality is measured; 0: none")
    parser.add_argument("--steps", type=int, default=5, help="of each training that is only timed")
    parser.add_argument("--small", action="store_true", help="a tiny network, two steps, one round")
    parser.add_argument("--json", type=Path, default=None, help="file for the rows")
    asked = parser.parse_args()
    cases = [CASES[name] for name in asked.cases]
    if asked.small:
        rows = run(asked.images, 1, asked.minutes or 0, 2, [small(case) for case in cases])
    else:
        minutes = 3 if asked.minutes is None else asked.minutes
        rows = run(asked.images, asked.rounds, minutes, max(2, asked.steps), cases)
    for one in rows:
        pair = f"{one['ours']:9.4g} {one['peer']:9.4g} {one['unit']}"
        print(f"{one['name']:<28} {pair} {one['ratio']:6.2f} x   {one['check']}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
