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
from selfsight.datamodules.datasets.copies import duplicates
from selfsight.datamodules.images.decode import read_image
from selfsight.datamodules.images.prepared import resized

from ..data.writers import write_pictures

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
    decoded = folder(root=str(tmp_path / "out"), resident=True, **SETTINGS).train
    assert decoded.in_memory
    assert duplicates(images, decoded) == duplicates(decoded, images) == len(images)


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, encode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(source, whole, f"encode={encode}")
    calls = []

    def counted(path: Path, max_pixels: int) -> np.ndarray:
        if len(calls) == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        calls.append(path)
        return read_image(path, max_pixels)

    stopped: list[bool] = []
    monkeypatch.setattr("selfsight.datamodules.datasets.preparing.read_image", counted)
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


def test_images_of_one_name_and_several_formats_stay_several(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    names = ["a.png", "a.png.jpg", "a.png.2.jpg", "b.JPG"]
    for level, name in enumerate(names):
        Image.new("RGB", (30, 30), (50 * level,) * 3).save(root / name, format="PNG" if name == "a.png" else "JPEG")
    (root / "labels.csv").write_text("".join(f"{name},{level}\n" for level, name in enumerate(names)))
    prepare(root, tmp_path / "out")
    data = read(tmp_path / "out")
    assert sorted(data.train.name(i) for i in range(4)) == ["a.png.2.jpg", "a.png.3.jpg", "a.png.jpg", "b.JPG"]
    for i in range(4):
        assert abs(int(data.train.read(i)[0, 0, 0]) - 50 * int(data.classes[int(data.train.labels[i])])) < 3


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_every_list_of_labels_is_copied(tmp_path: Path, encode: str) -> None:
    root = tmp_path / "source"
    write_pictures(root, [f"{part}/{i}.png" for part in ("train", "test") for i in range(3)])
    for part in ("train", "test"):
        (root / part / "labels.csv").write_text(f"path,label\n0.png,x\n{root / part}/1.png,y\n2.png,x\n")
    prepare(root, tmp_path / "out", f"encode={encode}")
    before, after = read(root), read(tmp_path / "out")
    assert before.classes == after.classes == ("x", "y")
    assert torch.equal(before.train.labels, after.train.labels)
    assert torch.equal(before.test.labels, after.test.labels)


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_lists_may_name_files_that_cannot_be_read(tmp_path: Path, encode: str) -> None:
    root = tmp_path / "source"
    write_pictures(root, [f"{i}.png" for i in range(6)])
    (root / "3.png").write_bytes(b"no image")
    (root / "labels.csv").write_text("".join(f"{i}.png,{'xy'[i % 2]}\n" for i in range(6)))
    prepare(root, tmp_path / "out", f"encode={encode}", "max_unreadable=0.2")
    assert read(tmp_path / "out").train.labels.tolist() == [0, 1, 0, 0, 1]
    if encode == "raw":  # a list that was made by hand
        (tmp_path / "out" / "labels.csv").write_bytes((root / "labels.csv").read_bytes())
        assert read(tmp_path / "out").train.labels.tolist() == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_a_repeated_command_follows_the_source(tmp_path: Path, encode: str) -> None:
    """Images changed, gone, new and renamed; folders and lists that went with them."""
    root, out = tmp_path / "source", tmp_path / "out"
    write_pictures(root, ["train/1.png", "train/2.png", "train/3.png", "test/4.png", "test/5.png"])
    for part in ("train", "test"):
        (root / part / "labels.csv").write_text("")
    prepare(root, out, f"encode={encode}")
    (root / "train" / "2.png").rename(root / "train" / "2.png.jpg")  # takes the name that 2.png had here
    write_pictures(root, ["train/1.png", "train/3.png.jpg", "more/6.png"], first_seed=30)
    for name in ("test/4.png", "test/5.png", "test/labels.csv"):
        (root / name).unlink()
    (root / "test").rmdir()
    for fresh in (tmp_path / "first", tmp_path / "second"):
        prepare(root, out, f"encode={encode}")
        prepare(root, fresh, f"encode={encode}")
        files = [sorted(p.relative_to(place) for p in place.rglob("*")) for place in (out, fresh)]
        assert files[0] == files[1]
        for name in files[0]:
            if name.suffix in (".jpg", ".bin", ".csv"):
                assert (out / name).read_bytes() == (fresh / name).read_bytes(), name
        assert len(read(out, labels="none").train) == 5
        (root / "train" / "labels.csv").unlink(missing_ok=True)


def test_what_has_not_changed_is_not_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for encode in ("jpeg", "raw"):
        prepare(source, tmp_path / encode, f"encode={encode}")
    made: list[Path] = []

    def counted(path: Path, max_pixels: int) -> np.ndarray:
        made.append(path)
        return read_image(path, max_pixels)

    monkeypatch.setattr("selfsight.datamodules.datasets.preparing.read_image", counted)
    last = source / "val" / "b" / "5.jpg"  # in the last shard
    os.utime(last, (1, 1))
    prepare(source, tmp_path / "jpeg", "encode=jpeg")
    assert made == [last]
    made.clear()
    prepare(source, tmp_path / "raw", "encode=raw")
    assert made == [last]
    made.clear()
    for encode in ("jpeg", "raw"):
        prepare(source, tmp_path / encode, f"encode={encode}")
    assert made == []


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_names_that_are_no_text(tmp_path: Path, encode: str) -> None:
    root = tmp_path / "source"
    write_pictures(root, ["a/1.png", "a/2.png", "b/1.png"])
    os.rename(root / "a", os.fsencode(root) + b"/\xe4")
    prepare(root, tmp_path / "out", f"encode={encode}")
    before, after = read(root), read(tmp_path / "out")
    assert [os.fsencode(name) for name in after.classes] == [b"b", b"\xe4"]
    ending = ".jpg" if encode == "jpeg" else ""
    assert [after.train.name(i) for i in range(3)] == [before.train.name(i) + ending for i in range(3)]
    assert after.train.read(2).shape[0] == 20


def test_unreadable_files_are_left_out_up_to_a_share(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "train" / "a" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "strict", "max_unreadable=0")
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
    latin = tmp_path / "latin"
    write_pictures(latin, ["1.png"])
    (latin / "labels.csv").write_bytes(b"1.png,\xe9")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "prepared.json").write_text("[1")
    capsys.readouterr()
    for words, told in (
        ((source, source / "inside"), "inside the source"),
        ((source, full), "not empty"),
        ((source, tmp_path / "out", "quality=50"), "begun with quality=90"),
        ((source, tmp_path / "new", "encode=jpg"), "Did you mean 'jpeg'"),
        ((tmp_path / "none", tmp_path / "new"), "no folder"),
        ((full, tmp_path / "new"), "no images"),
        ((source, tmp_path / "new", "quality=101"), "quality is 101"),
        ((source, tmp_path / "new", "shortest=2.5"), "shortest is 2.5"),
        ((source, tmp_path / "new", "workers=0"), "workers is 0"),
        ((source, tmp_path / "new", "workers=banana"), "workers is 'banana'"),
        ((source, tmp_path / "new", "max_unreadable=2"), "max_unreadable is 2"),
        ((2024, tmp_path / "new"), "source is '2024', which is no folder"),
        ((latin, tmp_path / "new"), "labels.csv' is no text in UTF-8"),
        ((source, broken), "prepared.json' cannot be read"),
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
