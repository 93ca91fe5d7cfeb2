"""`selfsight prepare`: smaller files or raw shards that read as the folder did, stopped and gone on with."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight import cli
from selfsight.datamodules import ImageData, folder
from selfsight.datamodules.decode import read_image
from selfsight.datamodules.prepared import resized

SETTINGS = {
    "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "labels": "auto", "test": None, "test_fraction": 0.0,
    "unlabelled": None, "max_unreadable": 0.2, "seed": 0,
}  # fmt: skip


def read(root: Path, **changes: object) -> ImageData:
    return folder(root=str(root), resident=False, **(SETTINGS | changes))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "source"
    for number in range(9):
        place = root / ("val" if number % 3 == 2 else "train") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        ending = "png" if number == 4 else "jpg"
        small.resize((50 + number, 40), Image.Resampling.BICUBIC).save(place / f"{number}.{ending}")
    return root


def prepare(source: Path, out: Path, *words: str) -> None:
    cli.main(["prepare", f"source={source}", f"out={out}", "shortest=20", "per_shard=2", *words])


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_reads_as_the_folder_did(source: Path, tmp_path: Path, encode: str) -> None:
    out = tmp_path / "out"
    prepare(source, out, f"encode={encode}", "quality=100")
    before, after = read(source), read(out)
    assert after.classes == before.classes
    assert after.prepared is not None
    assert (after.prepared["encode"], after.prepared["shortest"]) == (encode, 20)
    for part in ("train", "test"):
        old, new = before.split(part), after.split(part)
        assert len(new) == len(old)
        assert torch.equal(new.labels, old.labels)
        for i in range(len(old)):
            expected, got = resized(old.read(i), 20), new.read(i)
            assert min(got.shape[:2]) == 20
            assert got.shape == expected.shape
            difference = np.abs(got.astype(int) - expected)
            # coloured noise is the worst for JPEG; another image would be 60 levels off
            assert difference.max() == 0 if encode == "raw" else difference.mean() < 20


def test_shards_are_mapped_in_every_process_and_selected(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", "encode=raw")
    images = read(tmp_path / "out").train
    pixels = images.read(3)
    there = pickle.loads(pickle.dumps(images))
    assert not there._maps, "a worker opens the files itself"
    np.testing.assert_array_equal(there.read(3), pixels)
    some = images.select([3, 0])
    np.testing.assert_array_equal(some.read(0), pixels)
    assert some.name(0) == images.name(3)
    pixels[:] = 0  # what was read belongs to the reader
    assert images.read(3).any()


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, encode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(source, whole, f"encode={encode}")
    calls = []

    def counted(path: Path) -> np.ndarray:
        if len(calls) == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        calls.append(path)
        return read_image(path)

    stopped: list[bool] = []
    monkeypatch.setattr("selfsight.datamodules.decode.read_image", counted)
    with pytest.raises(SystemExit) as stop:
        prepare(source, out, f"encode={encode}", "workers=1")
    assert stop.value.code == 130
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "dataset=folder", f"dataset.root={out}", f"runs={tmp_path}"])
    assert "not prepared to the end" in capsys.readouterr().err
    prepare(source, out, f"encode={encode}", "workers=1")
    assert len(calls) < 2 * 9, "what was there is not made again"
    names = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    for name in names:
        if name.suffix in (".jpg", ".bin"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_labels_follow_their_files(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (30, 30), (len(name), 7, 9)).save(root / name)
    (root / "labels.csv").write_text("path,label\na.jpg,x\na.png,y\nb.png,x\n")
    for encode in ("jpeg", "raw"):
        prepare(root, tmp_path / encode, f"encode={encode}")
        data = read(tmp_path / encode)
        assert data.classes == ("x", "y")
        assert sorted(data.train.labels.tolist()) == [0, 0, 1]


def test_unreadable_files_are_left_out_up_to_a_share(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "train" / "a" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "strict")
    assert "broken.jpg" in capsys.readouterr().err
    for encode in ("jpeg", "raw"):
        out = tmp_path / encode
        prepare(source, out, f"encode={encode}", "max_unreadable=0.2")
        assert json.loads((out / "prepared.json").read_text())["unreadable"] == {"train/a/broken.jpg": "no image"}
        assert len(read(out).train) == 6


def test_refusals_in_one_sentence(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(source, tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    capsys.readouterr()
    for words, told in (
        ((source, source / "inside"), "inside the source"),
        ((source, full), "not empty"),
        ((source, tmp_path / "out", "quality=50"), "begun with quality=90"),
        ((source, tmp_path / "new", "encode=jpg"), "Did you mean 'jpeg'"),
        ((tmp_path / "none", tmp_path / "new"), "no folder"),
        ((full, tmp_path / "new"), "no images"),
        ((source, tmp_path / "new", "quality=101"), "quality is 101"),
    ):
        with pytest.raises(SystemExit):
            prepare(*words)  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not os.path.exists(tmp_path / "new")


def test_a_run_on_a_prepared_folder_keeps_the_record(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", "encode=raw")
    cli.main(
        ["pretrain", "debug=smoke", "dataset=folder", f"dataset.root={tmp_path / 'out'}", "dataset.image_size=16",
         "batch_size=4", "report=false", f"runs={tmp_path}", "name=run"]
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "prepared.json").read_text())["encode"] == "raw"
