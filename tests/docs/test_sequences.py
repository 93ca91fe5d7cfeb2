"""The commands of the pages, typed one after the other from one folder as a reader would, with runs made short."""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pytest
import tifffile
import torch
from PIL import Image
from pyarrow import parquet
from torchvision.models.resnet import Bottleneck

from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone
from selfsight.cli import main, split_flags
from selfsight.composition.overrides import checked
from selfsight.evaluation.dense.segmentation import shapes

from ..checkpoints import published
from ..evaluation.test_detection import content_of
from .test_examples import place

__all__ = ["place"]

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/backbones.md", "docs/datasets.md", "docs/few_labels.md",
         "docs/performance.md", "docs/reliability.md", "docs/start.md", "docs/weights.md",
         "docs/howto/channels.md", "docs/howto/own_data.md", "docs/howto/own_network.md",
         "docs/howto/spot.md")  # fmt: skip
COMMAND = re.compile(r"^    (selfsight\b(?:\\\n|.)*)$", re.M)
#: in a command that takes what a test has not: downloads, large sets, a hub, a server, a page left open, a failed run,
#: a list of images kept, which depends on the run that made it
ONLY_CHECKED = re.compile(
    r"download=true|imagenet|dataset=cifar|push=|hf-hub:|explore|replay|://|cifar10_90knn|umap"
    r"|selfsight prune|dataset\.only"
)
#: words that make a job short
SHORT = {
    "pretrain": ["debug=smoke", "report=false"],
    "finetune": ["debug=smoke", "report=false"],
    "distill": ["debug=smoke", "report=false"],
    "compare": ["approaches=[supervised]", "labels_per_class=[1]", "seeds=1", "workers=1", "words=['debug=smoke']"],
    "detect": [
        "detection.iterations=1",
        "detection.batch_size=2",
        "detection.short_side=[64]",
        "detection.boxes=16",
        "detection.proposals=20",
        "num_workers=0",
    ],
    "profile": ["debug=smoke", "warmup=0", "steps=1"],
    "dense": ["evaluator.data.train=8", "evaluator.data.test=4"],
}


OWN_NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        layers = [layer for i in range(depth) for layer in (nn.Conv2d(3 if not i else 8, 8, 3, 2, 1), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.layers(x)
"""


def sequence(page: Path) -> Iterator[str]:
    """Commands in their order; two in one line are two."""
    for found in COMMAND.finditer(page.read_text()):
        for command in re.split(r"\s{2,}(?=selfsight )", found[1].replace("\\\n", " ")):
            yield command.strip()


def short(job: str, words: list[str]) -> list[str]:
    """A job's words, with more that make it short where they do not say that themselves."""
    if job == "dense" and any("segmentation.folder" in word for word in words):
        return words
    if any(word.startswith(("resume=runs/", "debug=")) for word in words):
        return [re.sub(r"^extend=\d+", "extend=1", word) for word in words]
    words = [word.partition(",")[0] if word.startswith("seed=") else word for word in words]
    words = [re.sub(r"^labels\.per_class=\d+", "labels.per_class=1", word) for word in words]
    words = [re.sub(r"^trainer\.max_epochs=\d+", "trainer.max_epochs=2", word) for word in words]
    words = [f"{word} debug=smoke" if word.startswith("pretrain=") else word for word in words]
    small = ["dataset.image_size=32"] if job in ("pretrain", "profile") and "dataset=folder" in words else []
    said = {word.partition("=")[0] for word in words}
    return [*words, *(word for word in [*SHORT.get(job, []), *small] if word.partition("=")[0] not in said)]


def make_what_pages_name(top: Path) -> None:
    """Files and folders that the pages take for granted, beside those of `place`."""
    rng = np.random.default_rng(0)
    for i in range(24):
        kind = ("barley", "rye")[i % 2]
        (top / "fields" / kind).mkdir(parents=True, exist_ok=True)
        bands = rng.integers(0, 60000, (20, 20, 4), dtype=np.uint16)
        tifffile.imwrite(top / "fields" / kind / f"{i}.tif", bands, photometric="minisblack", planarconfig="contig")
    for i in range(24):
        (top / "flowers" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            top / "flowers" / "ab"[i % 2] / f"{i}.png"
        )
    (top / "downloads" / "data").mkdir(parents=True)
    files = sorted((top / "photos").rglob("*.jpg"))
    rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
    parquet.write_table(pyarrow.table(rows), top / "downloads" / "data" / "train-00000-of-00001.parquet")
    with h5py.File(top / "cells.h5", "w") as file:
        file["images"] = rng.integers(0, 255, (24, 20, 20, 3), dtype=np.uint8)
    (top / "coco" / "annotations").mkdir(parents=True)
    for split, number in (("train2017", 4), ("val2017", 2)):
        content = content_of(number, top / "coco" / split)
        (top / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (top / "DIR").mkdir()
    spec = {"backbone": {"name": "resnet18", "stem": "cifar"}, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    export_backbone(create("resnet18", stem="cifar"), spec, top / "DIR")
    for part in ("images", "masks"):
        (top / "DIR" / part).mkdir()
    drawn = shapes(train=6, test=0, size=48).train
    for i in range(6):
        image, mask = drawn[i]
        Image.fromarray(image).save(top / "DIR" / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(top / "DIR" / "masks" / f"{i}.png")


def make_checkpoints(top: Path) -> None:
    """Files of others: SwAV's ResNet-50, PixPro's, and a plain ResNet-50."""
    net = published.resnet((3, 4, 6, 3), Bottleneck)
    for name in ("swav_800ep.pth.tar", "swav_800ep_pretrain.pth.tar"):
        torch.save(published.under("module.", net.state_dict()), top / name)
    torch.save(net.state_dict(), top / "checkpoint.pth")
    torch.save(published.pixpro().content, top / "ckpt.pth")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_from_top_to_bottom(
    page: str, place: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_what_pages_name(place)
    if "import source=" in (text := (ROOT / page).read_text()) or "init_from=checkpoint" in text:
        make_checkpoints(place)
    (place / "mymodule.py").write_text(OWN_NETWORK)
    for file, code in re.findall(r"`(\w+\.py)` in the working directory:\n\n```python\n(.+?)```", text, re.S):
        (place / file).write_text(code)
    for name in ("simclrv2-digits-1", *("AB" if "runs/A" in text else ())):  # the README's first, and its likes
        shutil.copytree(finished_run, place / "runs" / name)
    for command in sequence(ROOT / page):
        words = shlex.split(command, comments=True)[1:]
        words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
        print(f"--- {command}")
        if ONLY_CHECKED.search(command):
            flags, (job, *rest) = split_flags(words)
            checked(job, rest, sweep="multirun" in flags.switches)
            continue
        status = 0
        try:
            main([words[0], *short(words[0], words[1:])] if words else [])
        except SystemExit as stop:
            status = stop.code
        assert not status, f"{command}\n{capsys.readouterr().err}"
