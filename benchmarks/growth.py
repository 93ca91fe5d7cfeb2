"""How time and memory grow: python benchmarks/growth.py files | knn | linear [--images N] | sinkhorn | … | draw

``files`` makes folders of 1,000, 10,000, … hard links to a few small JPEG files and measures, each in a process of its
own, the seconds to list them and to open the data set, the bytes it keeps for each file, the seconds of an epoch of
reading (of more than 102,400 files that many are read, and the seconds carried over to all), how much memory a worker
process gains from the second epoch to the last, and the seconds that a training of
two steps takes from its command to its end, and that it takes when it goes on for two more. ``knn`` and ``linear`` put
features of ``--images`` x 256 in half precision into a file and measure how far the memory of the process peaks above
what it was before, the pages of the file included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import laws
import numpy as np
from PIL import Image
from watch import MIB, cpu_seconds, memory, peak_mib, workers

#: files in a folder of a class, and different files that the links lead to
IN_FOLDER, FILES = 1000, 16
WIDTH, CLASSES, QUERIES = 256, 100, 10_000
TITLES = {"knn": "kNN", "linear": "linear probe"}
TRAINING = (
    "method=simsiam", "dataset=folder", "dataset.image_size=32", "dataset.test_fraction=0", "dataset.resident=false",
    "backbone=resnet_digits", "batch_size=64", "num_workers=1", "trainer.limit_batches=2", "trainer.accelerator=cpu",
    "trainer.max_epochs=1", "report=false", "evaluator.final={}", "evaluator.online.evaluators={}",
    "evaluator.online.limit=256",
)  # fmt: skip


def linked(root: Path, files: int) -> None:
    """A folder of ``files`` images in class folders, all of them links to `FILES` files."""
    rng = np.random.default_rng(0)
    originals = []
    for i in range(FILES):
        originals.append(root / "originals" / f"{i}.jpg")
        originals[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(originals[-1])
    for i in range(files):
        place = root / "images" / f"class-{i // IN_FOLDER:04}"
        if i % IN_FOLDER == 0:
            place.mkdir(parents=True)
        os.link(originals[i % FILES], place / f"image-{i:07}.jpg")


def of_folder(root: Path, epochs: int = 4) -> dict[str, float]:
    """The figures of a folder of images, in this process."""
    from selfsight.datamodules import ImageDataModule, folder
    from selfsight.datamodules.datasets.search import find_images
    from selfsight.datamodules.views.view import View

    began, used = time.perf_counter(), cpu_seconds()
    files = len(find_images(root))
    listed, listed_cpu = time.perf_counter() - began, cpu_seconds() - used
    began = time.perf_counter()
    data = folder(root, image_size=32, resident=False, test_fraction=0)
    opened = time.perf_counter() - began
    tracemalloc.start()  # which takes time of its own; what the process holds is more, since it keeps what it has freed
    again = folder(root, image_size=32, resident=False, test_fraction=0)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] + (0 if again.train.labels is None else again.train.labels.nbytes)
    tracemalloc.stop()
    module = ImageDataModule(data, [View(size=32)], batch_size=min(256, len(data.train)), num_workers=1, engine="cpu")
    seconds, cpu, private = [], [], []
    loader = module.train_dataloader()
    for _ in range(epochs):
        began, used = time.perf_counter(), cpu_seconds()
        steps = 0
        for _ in loader:
            steps += 1
            if steps == 400:  # of a large set as much as tells how memory grows; the seconds are those of the rest, too
                break
        seconds.append((time.perf_counter() - began) / steps * len(loader))
        cpu.append((cpu_seconds() - used) / steps * len(loader))
        children = [memory(child)["Private_Dirty"] for child in workers()]
        private.append(max(children, default=0))
    module.close()
    return {
        "files": files,
        "list_seconds": listed,
        "list_cpu_seconds": listed_cpu,
        "open_seconds": opened,
        "bytes_a_file": kept / files,
        "epoch_seconds": min(seconds),
        "epoch_cpu_seconds": min(cpu),
        "worker_gain_mib": (private[-1] - private[1]) / MIB,
    }


def of_training(root: Path) -> dict[str, float]:
    """Seconds of a command that trains for two steps on a folder, and of one that goes on for two more."""
    with tempfile.TemporaryDirectory() as runs:
        words = [f"dataset.root={root}", f"runs={runs}", "name=run", *TRAINING]
        seconds = []
        for typed in (words, [f"resume={runs}/run", "extend=1"]):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "selfsight.cli", "pretrain", *typed], check=True, stdout=subprocess.DEVNULL
            )
            seconds.append(time.perf_counter() - began)
    return dict(zip(("start_seconds", "resume_seconds"), seconds, strict=True))


def features_in_files(images: int, place: Path) -> None:
    """A bank and queries around `CLASSES` centres, in half precision."""
    import torch

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    for name, count in (("train", images), ("test", QUERIES)):
        labels = torch.arange(count) % CLASSES
        x = np.lib.format.open_memmap(place / f"{name}.npy", mode="w+", dtype=np.float16, shape=(count, WIDTH))
        for start in range(0, count, 10_000):
            of = labels[start : start + 10_000]
            x[start : start + len(of)] = (centres[of] + 3 * torch.randn(len(of), WIDTH, generator=generator)).numpy()


def of_features(place: Path, probe: str) -> dict[str, float]:
    """The figures of a probe on features in files, in this process, which has not made them: their pages count."""
    import torch

    from selfsight.evaluation import KNN, LinearProbe
    from selfsight.evaluation.features import Features

    def opened(name: str) -> Features:
        x = torch.from_numpy(np.load(place / f"{name}.npy", mmap_mode="c"))
        return Features(x, torch.arange(len(x)) % CLASSES, torch.arange(len(x)))

    train, test = opened("train"), opened("test")
    evaluator = KNN() if probe == "knn" else LinearProbe()
    evaluator(train.take(torch.arange(1000)), test.take(torch.arange(1000)))  # libraries are loaded
    gc.collect()
    before = peak_mib()
    began, used = time.perf_counter(), time.process_time()
    found = evaluator(train, test)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {
        "images": len(train.x),
        "bank_mib": 2 * len(train.x) * WIDTH / MIB,
        "peak_mib": peak_mib(),
        "peak_before_mib": before,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "top1": float(found[f"{probe}_top1"]),
    }


def apart(*words: str) -> dict[str, float]:
    """What this file prints in a process of its own."""
    made = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["files", "knn", "linear", *laws.LAWS, "draw"])
    parser.add_argument("--images", type=int, nargs="*", default=[200_000], help="of the bank; several make a curve")
    parser.add_argument("--most", type=int, default=100_000, help="files of the largest folder")
    parser.add_argument("--folder", type=Path, help="measure this one, in this process")
    parser.add_argument("--bank", type=Path, help="folder of features that are measured in this process")
    asked = parser.parse_args()
    if asked.what == "draw":
        laws.draw()
    elif asked.what in laws.LAWS:
        import torch

        torch.set_num_threads(1)
        laws.measure(asked.what)
    elif asked.folder is not None:
        print(json.dumps(of_folder(asked.folder)))
    elif asked.bank is not None:
        print(json.dumps(of_features(asked.bank, asked.what)))
    elif asked.what != "files":
        points = []
        for images in asked.images:
            with tempfile.TemporaryDirectory() as place:
                features_in_files(images, Path(place))
                points.append((images, apart(asked.what, "--bank", place)))
            show(points[-1][1])
        if len(points) > 1:
            banks = [
                (size, {"seconds": of["cpu_seconds"], "mib": of["peak_mib"] - of["peak_before_mib"]})
                for size, of in points
            ]
            laws.keep(asked.what, f"{TITLES[asked.what]} of {QUERIES:,} images", "images of the bank", banks)
    else:
        points = []
        files = 1000
        while files <= asked.most:
            with tempfile.TemporaryDirectory() as place:
                linked(Path(place), files)
                figures = apart("files", "--folder", f"{place}/images") | of_training(Path(place, "images"))
            points.append((files, figures))
            show(points[-1][1])
            files *= 10
        if len(points) > 1:
            laws.keep("files", "an epoch of reading", "files of the folder", points)


def show(figures: dict[str, float]) -> None:
    print(
        "  ".join(f"{name} {value:,.4g}" if value < 1000 else f"{name} {value:,.0f}" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
