from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selfsight.contracts import Batch
from selfsight.datamodules.images.sets import ArrayImages, GoneImages
from selfsight.evaluation.cache import FeatureCache, data_digest, weights_digest

from .conftest import TinyBackbone


class Source:
    """A datamodule as far as the cache needs one; counts how often its images are read."""

    def __init__(self, batches: list[Batch]) -> None:
        labels = torch.cat([b.labels for b in batches if b.labels is not None])
        pixels = (torch.cat([b.views[0] for b in batches]) * 40).to(torch.uint8)
        images = ArrayImages(pixels, labels)
        self.data = SimpleNamespace(image_size=9, eval_resize=None, split=lambda _: images)
        self.views = [SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)]
        self.images, self.batches, self.reads = images, batches, 0

    def eval_dataloader(self, split: str) -> list[Batch]:
        self.reads += 1
        return self.batches


@pytest.fixture
def source(batches: list[Batch]) -> Source:
    return Source(batches)


def test_the_second_time_comes_from_disk_and_is_equal(tmp_path: Path, backbone: TinyBackbone, source: Source) -> None:
    cache = FeatureCache(tmp_path)
    first = cache.extract(backbone, source, "train", stages=["final", "stem"])
    second = cache.extract(backbone, source, "train", stages=["stem", "final"])
    assert source.reads == 1
    for stage in ("final", "stem"):
        assert torch.equal(first[stage].x, second[stage].x)
        assert torch.equal(first[stage].known_labels, second[stage].known_labels)
        assert torch.equal(first[stage].indices, second[stage].indices)
    assert not list(tmp_path.glob("*.part"))


def test_a_new_stage_alone_is_extracted(tmp_path: Path, backbone: TinyBackbone, source: Source) -> None:
    cache = FeatureCache(tmp_path)
    cache.extract(backbone, source, "train")
    assert len(list(tmp_path.iterdir())) == 1
    found = cache.extract(backbone, source, "train", stages=["final", "stem"])
    assert list(found) == ["final", "stem"]
    assert (source.reads, len(list(tmp_path.iterdir()))) == (2, 2)


def test_every_thing_features_depend_on_changes_the_key(tmp_path: Path, backbone: TinyBackbone, source: Source) -> None:
    cache = FeatureCache(tmp_path)

    def reads_again() -> bool:
        before = source.reads
        cache.extract(backbone, source, "train")
        return source.reads > before

    assert reads_again()
    assert not reads_again()
    with torch.no_grad():
        backbone.top[1].running_mean[2] += 1e-6
    assert reads_again(), "BatchNorm statistics are weights too"
    backbone.top[0].stride = (1, 1)
    assert reads_again(), "the same tensors in another architecture"
    source.images.pixels[3, 0, 0, 0] += 1
    assert reads_again()
    source.images.labels[0] = 2
    assert reads_again()
    source.data.eval_resize = 12
    assert reads_again()
    source.views[0].mean = (0.4, 0.5, 0.5)
    assert reads_again()
    assert not reads_again()


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "empty", "text"])
def test_a_damaged_file_is_named_and_made_again(
    damage: str, tmp_path: Path, backbone: TinyBackbone, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path)
    good = cache.extract(backbone, source, "train")["final"]
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(
        {"flip a bit": bytes(content), "cut": bytes(content[:-20]), "empty": b"", "text": b"x" * 300}[damage]
    )
    with caplog.at_level(logging.WARNING, "selfsight"):
        again = cache.extract(backbone, source, "train")["final"]
    assert path.name in caplog.text
    assert torch.equal(again.x, good.x)
    assert source.reads == 2
    cache.extract(backbone, source, "train")
    assert source.reads == 2, "the file was put right"


def test_files_are_known_by_name_size_and_time(tmp_path: Path) -> None:
    def images(*names: str) -> Any:
        return type("Files", (), {
            "labels": None, "targets": None, "pixels": None, "__len__": lambda self: len(names),
            "name": lambda self, i: names[i], "file": lambda self, i: tmp_path / names[i],
        })()  # fmt: skip

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"123")
    both = data_digest(images("a", "b"))
    assert both == data_digest(images("a", "b"))
    assert both != data_digest(images("b", "a"))
    (tmp_path / "a").write_bytes(b"1234")
    assert both != data_digest(images("a", "b"))


def test_images_of_parts_and_names_that_are_no_text(tmp_path: Path) -> None:
    """Files that make only a part of a set are told by name, size and time, too, and a name may be any bytes."""
    from selfsight.datamodules.images.sets import FileImages, JoinedImages

    name = os.fsdecode(b"\xe4.png")
    for file in (name, "b.png"):
        (tmp_path / file).write_bytes(b"no image is ever read here")
    one, other = FileImages(tmp_path, [name]), FileImages(tmp_path, ["b.png"])
    assert data_digest(one) != data_digest(other)
    assert data_digest(JoinedImages([one, other])) == data_digest(FileImages(tmp_path, [name, "b.png"]))


def test_features_that_cannot_be_kept_are_said(
    tmp_path: Path, backbone: TinyBackbone, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "selfsight"):
        found = FeatureCache(tmp_path / "taken").extract(backbone, source, "train", stages=["final", "stem"])
    assert torch.equal(found["final"].x, FeatureCache(tmp_path / "free").extract(backbone, source, "train")["final"].x)
    assert caplog.text.count("cannot be kept") == 1


def test_weights_digest_sees_dtype_names_and_head() -> None:
    layer = nn.Linear(3, 3)
    assert weights_digest(layer) != weights_digest(layer, layer)
    assert weights_digest(layer) == weights_digest(layer, None)
    assert weights_digest(nn.Sequential(layer)) != weights_digest(layer)


def test_images_that_are_gone_are_told_by_their_names() -> None:
    first, other = (data_digest(GoneImages(names)) for names in (["a.png", "b.png"], ["a.png", "c.png"]))
    assert first == data_digest(GoneImages(["a.png", "b.png"])) != other
