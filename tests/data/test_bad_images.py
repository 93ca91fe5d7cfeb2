"""Unusual files all the way to batches, on both engines: never an error, never a view that is not of its image."""

from __future__ import annotations

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.datamodules import ImageDataModule, folder
from selfsight.datamodules.views.view import View

from .writers import encoded

RED = (200, 40, 90)
SIZE = 16


def flat(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def write_unusual(root: Path) -> None:
    """Images of one colour each, so that any crop of them is known."""
    files = {
        "progressive.jpg": encoded(flat(40, 30), quality=95, progressive=True),
        "cmyk.jpg": encoded(flat(40, 30).convert("CMYK"), quality=95),
        "grey.png": encoded(Image.new("L", (30, 40), 120), "PNG"),
        "sixteen.png": cv2.imencode(".png", np.full((30, 40), 120 * 256 + 7, np.uint16))[1].tobytes(),
        "one_pixel.png": encoded(flat(1, 1), "PNG"),
        "one_row.png": encoded(flat(1, 50), "PNG"),
        "one_column.png": encoded(flat(50, 1), "PNG"),
        "smaller_than_crop.png": encoded(flat(5, 7), "PNG"),
        "odd.png": encoded(flat(37, 23), "PNG"),
        "huge.jpg": encoded(flat(4000, 3001), quality=90),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)


def module(root: Path, engine: str, batch_size: int, workers: int = 0) -> ImageDataModule:
    data = folder(
        root=str(root), image_size=SIZE, mean=[0.0] * 3, std=[1.0] * 3, labels="none", test=None, test_fraction=0.0,
        unlabelled=None, resident=False, max_unreadable=0.0, seed=0, channels="rgb",
    )  # fmt: skip
    view = View(size=SIZE, count=2, crop="resized", hflip=0.5, blur=0.5, mean=data.mean, std=data.std)
    return ImageDataModule(data, [view], batch_size=batch_size, num_workers=workers, engine=engine, seed=0)


@pytest.mark.parametrize("engine", ["cpu", "device"])
@pytest.mark.parametrize(("batch_size", "workers"), [(10, 0), (1, 0), (3, 0), (5, 3)])
def test_every_view_has_the_colour_of_its_image(tmp_path: Path, engine: str, batch_size: int, workers: int) -> None:
    """Batches of one, batches that do not divide the set, and more workers than cores among them."""
    write_unusual(tmp_path)
    data = module(tmp_path, engine, batch_size, workers)
    seen = []
    for batch in data.train_dataloader():
        assert [view.shape for view in batch.views] == [(batch_size, 3, SIZE, SIZE)] * 2
        for view in batch.views:
            for pixels, index in zip(view, batch.indices.tolist(), strict=True):
                name = data.images.name(index)
                colour = (120, 120, 120) if name in ("grey.png", "sixteen.png") else RED
                expected = torch.tensor(colour)[:, None, None] / 255
                assert (pixels - expected).abs().max() < 0.02, name
        seen += batch.indices.tolist()
    assert len(seen) == len(set(seen)) == 10 // batch_size * batch_size


@pytest.mark.slow
def test_a_folder_that_is_bad_in_every_way(tmp_path: Path) -> None:
    """The short form of benchmarks/bad_data.py, with files that go bad while it is trained on."""
    bad_data = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bad_data.py"))
    words = ["dataset.max_unreadable=0.4", "num_workers=1", "evaluator.online.every=3"]
    outcome, wrong, _ = bad_data["check"](tmp_path, 150, 0.3, 0, words)
    assert wrong == []
    assert len(outcome.told) == 32  # two of each of 14 kinds that are no images, and the four that were spoiled
    assert "passed over: 32 unreadable files" in outcome.said
