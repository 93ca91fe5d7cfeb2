"""What a large set keeps for each of its files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import torch

from selfsight.datamodules.images.archives import ArchiveImages
from selfsight.datamodules.images.sets import FileImages, ImageSet
from selfsight.datamodules.images.tars import LocalTars

FILES = 20_000


def of_files(names: list[str]) -> ImageSet:
    return FileImages(Path("photos"), names, torch.zeros(FILES, dtype=torch.int64))


def of_tars(names: list[str]) -> ImageSet:
    places = np.zeros((FILES, 3), np.int64)
    return ArchiveImages(LocalTars(Path("photos"), ["a.tar"]), names, places, torch.zeros(FILES, dtype=torch.int64))


def test_a_set_keeps_few_bytes_for_each_file() -> None:
    """Names in one array, which worker processes share, and no object of Python for each."""
    for made_of in (of_files, of_tars):
        names = [f"class-{i % 100:04}/image-{i:07}.jpg" for i in range(FILES)]
        tracemalloc.start()
        images = made_of(names)
        some = images.select(torch.arange(0, FILES, 2))
        kept = tracemalloc.get_traced_memory()[0] + 8 * (len(images) + len(some))  # labels lie with torch
        tracemalloc.stop()
        assert kept < 100 * (len(images) + len(some))
        assert some.name(3) == names[6]
