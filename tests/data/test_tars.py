"""Tar files in WebDataset's form hold the same set as the folder they were made from, and are read by others."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from selfsight import cli
from selfsight.datamodules import ImageData, ImageDataModule, folder
from selfsight.datamodules.images.tars import INDEX, members
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError


def picture(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 14, 3)).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tars") / "photos"
    for i in range(14):
        place = root / ("sea" if i % 2 else "wood") / f"{i}{'.v2' if i == 3 else ''}.{'png' if i % 3 else 'jpg'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(i, "PNG" if i % 3 else "JPEG"))
    return root


@pytest.fixture(scope="module")
def shards(photos: Path) -> Path:
    out = photos.with_name("shards")
    cli.main(["prepare", f"source={photos}", f"out={out}", "encode=tar", "per_shard=5", "workers=2"])
    return out


def batches(data: ImageData, workers: int = 0) -> list[torch.Tensor]:
    module = ImageDataModule(data, [View(8, count=2, crop="resized", hflip=0.5)], batch_size=4, num_workers=workers)
    found = []
    for batch in [*module.train_dataloader(), *module.train_dataloader(), *module.eval_dataloader("test")]:
        assert batch.labels is not None
        found += [*batch.views, batch.indices, batch.labels]
    return found


@pytest.mark.parametrize("resident", [False, True])
def test_the_same_batches(photos: Path, shards: Path, resident: bool) -> None:
    """Order, split, labels and pixels; read by workers, too."""
    one, other = (folder(root, image_size=8, test_fraction=0.3, resident=resident) for root in (photos, shards))
    assert other.classes == ("sea", "wood")
    assert [one.train.name(i) for i in range(len(one.train))] == [other.train.name(i) for i in range(len(other.train))]
    expected = batches(one)
    for workers in (0, 2) if not resident else (0,):
        for a, b in zip(expected, batches(other, workers), strict=True):
            assert torch.equal(a, b)
    assert len(list(shards.glob("*.tar"))) == 3


def test_it_is_webdatasets_form(shards: Path) -> None:
    """Another's library finds the same images and classes in ours."""
    import webdataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 14
    assert {int(sample["cls"]) for sample in samples if sample["__key__"].startswith("wood")} == {1}
    content = {sample["__key__"]: sample.get("jpg") or sample.get("png") for sample in samples}
    assert content["wood/0"] == picture(0)


def test_others_are_read(tmp_path: Path) -> None:
    """As img2dataset and webdataset's writer make them: numbers as names, .cls beside, several members to a sample."""
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05}.tar")) as file:
            for i in range(6):
                key = f"{shard}{i:05}"
                file.write({"__key__": key, "png": picture(6 * shard + i, "PNG"), "cls": i % 3, "json": {"k": 1}})
    data = folder(tmp_path, test_fraction=0, tars=True)
    assert data.classes == ("0", "1", "2")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    expected = np.asarray(Image.open(io.BytesIO(picture(7, "PNG"))))
    assert np.array_equal(data.train.read(7), expected)


def test_without_webdataset(tmp_path: Path) -> None:
    """The same names in two tar files are told apart; other members are counted; 16 bits stay 16 bits."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for i in range(2):
                buffer = io.BytesIO()
                tifffile.imwrite(buffer, np.full((4, 4), 1000 * shard + i, np.uint16))
                _add(file, f"{i}.tif", buffer.getvalue())
            _add(file, "notes.pdf", b"x")
    data = folder(tmp_path, labels="none", test_fraction=0)
    assert [data.train.name(i) for i in range(4)] == ["0/0.tif", "0/1.tif", "1/0.tif", "1/1.tif"]
    assert [int(data.train.read(i)[0, 0, 0]) for i in range(4)] == [0, 1, 1000, 1001]
    assert "2 .pdf" in " ".join(data.about)


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    file.addfile(about, io.BytesIO(content))


def _cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[: members(tar)[-1].offset + 10])


def _compress(tar: Path) -> None:
    import gzip

    tar.write_bytes(gzip.compress(tar.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, r"0\.tar' is cut short: '2\.jpg' is the last that begins in it; copy it again"),
        (_compress, r"0\.tar' is no tar file, or a compressed one"),
        (lambda tar: tar.unlink(), r"holds no tar files"),
        (lambda tar: _write(tar, {"a.jpg": picture(0), "a.cls": b"cat"}), r"'a.cls' .*holds 'cat'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    tar = tmp_path / "0.tar"
    _write(tar, {f"{i}.jpg": picture(i) for i in range(3)})
    damage(tar)
    with pytest.raises(UserError, match=words):
        folder(tmp_path, tars=True)


def _write(tar: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(tar, "w") as file:
        for name, each in content.items():
            _add(file, name, each)


def test_an_index_that_is_older_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = tmp_path / "0.tar"
    _write(tar, {f"{i}.jpg": picture(i) for i in range(3)})
    folder(tmp_path, test_fraction=0, labels="none")
    before = json.loads((tmp_path / f"0.tar{INDEX}").read_text())
    assert not caplog.records
    _write(tar, {f"{i}.jpg": picture(i + 9) for i in range(5)})
    os.utime(tar, (1, 1))
    data = folder(tmp_path, test_fraction=0, labels="none")
    assert len(data.train) == 5
    assert "is of another '0.tar' than the one there" in caplog.text
    assert json.loads((tmp_path / f"0.tar{INDEX}").read_text()) != before


def test_a_member_that_is_no_image_is_passed_over(tmp_path: Path) -> None:
    """Named and counted as a damaged file is; beyond the share that is tolerated, refused."""
    _write(tmp_path / "0.tar", {f"{i}.jpg": picture(i) if i else b"no image" for i in range(4)})
    data = folder(tmp_path, test_fraction=0, labels="none", max_unreadable=0.5, resident=True)
    assert len(data.train) == 3
    assert str(data.unreadable) == "1 unreadable file, '0.jpg': no image"
    with pytest.raises(UserError, match=r"1 of 4 files cannot be read as images, such as '0.jpg' \(no image\)"):
        folder(tmp_path, test_fraction=0, labels="none", resident=True, max_unreadable=0)


def test_the_dataset_by_name(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["stats", "dataset=shards", f"dataset.root={shards}"])
    assert "shards (" in capsys.readouterr().out
