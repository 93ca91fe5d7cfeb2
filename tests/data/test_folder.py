"""Any folder is a data set: with class folders, a list, or nothing; and every way it can be wrong is one sentence."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from selfsight.datamodules import ArrayImages, FileImages, ImageData, folder, join
from selfsight.datamodules.datasets import copies, dataset, inspection
from selfsight.datamodules.datasets.copies import duplicates
from selfsight.datamodules.datasets.search import find_images
from selfsight.datamodules.datasets.unreadable import UnreadableFiles
from selfsight.datamodules.images import memory
from selfsight.datamodules.images.decode import read_image
from selfsight.datamodules.images.sets import SomeImages
from selfsight.errors import UserError

from .writers import encoded, picture, write_pictures


def make(root: Path | None, **changes: Any) -> ImageData:
    options: dict[str, Any] = {
        "root": root and str(root), "image_size": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3, "labels": "auto",
        "test": None, "test_fraction": 0.0, "unlabelled": None, "resident": False, "max_unreadable": 0.0, "seed": 0,
    }  # fmt: skip
    return folder(**{**options, **changes})


def names(data: ImageData, part: str = "train") -> list[str]:
    chosen = data.split(part)
    return [chosen.name(i) for i in range(len(chosen))]


def test_no_folders_no_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["b.jpg", "a.png", "c.bmp"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.jpg").write_text("no image")
    data = make(tmp_path)
    assert names(data) == ["a.png", "b.jpg", "c.bmp"]
    assert data.train.labels is None
    assert data.classes == ()
    assert data.test is None


def test_class_folders_in_any_depth(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["dog/1.jpg", "cat/old/2.jpg", "cat/1.jpg"])
    data = make(tmp_path)
    assert data.classes == ("cat", "dog")
    assert names(data) == ["cat/1.jpg", "cat/old/2.jpg", "dog/1.jpg"]
    assert data.train.labels.tolist() == [0, 0, 1]
    assert make(tmp_path, labels="none").train.labels is None


def test_one_subfolder_is_no_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["camera/1.jpg", "camera/2.jpg"])
    assert make(tmp_path).train.labels is None
    with pytest.raises(UserError, match=r"are of one class, 'camera', .* or set dataset.labels=none"):
        make(tmp_path, labels="folders")


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["10/a.png", "9/a.png"])
    assert make(tmp_path).classes == ("9", "10")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_pictures(tmp_path / "store", ["x.png", "y.png"])
    (tmp_path / "set" / "a").mkdir(parents=True)
    os.symlink(tmp_path / "store", tmp_path / "set" / "b")
    os.symlink(tmp_path / "set", tmp_path / "set" / "a" / "loop")
    assert find_images(tmp_path / "set") == ["b/x.png", "b/y.png"]


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_train_beside_test(tmp_path: Path, test_name: str) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/1.png", f"{test_name}/b/2.png"])
    data = make(tmp_path, test_fraction=0.5)
    assert names(data) == ["a/1.png", "b/1.png"]
    assert names(data, "test") == ["b/2.png"]
    assert data.test.labels.tolist() == [1]


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "Val"), ("training", "testing")])
def test_parts_are_known_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    write_pictures(tmp_path, [f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/2.png"])
    data = make(tmp_path)
    assert names(data) == ["a/1.png", "b/1.png"]
    assert data.test.labels.tolist() == [1]


def test_train_without_a_test_folder_is_the_root(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/1.png", "train/b/2.png", "more/1.png", "held/a/1.png"])
    data = make(tmp_path, unlabelled="more", test="held")
    assert (data.classes, names(data)) == (("a", "b"), ["a/1.png", "b/1.png", "b/2.png"])
    assert len(make(tmp_path, unlabelled="more", test="held", labels="none").everything()) == 4


def test_train_beside_other_classes_is_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "tram/1.png"])
    assert make(tmp_path).classes == ("train", "tram")


def test_another_test_folder_beside_train_and_test(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{part}/{c}/1.png" for part in ("train", "test", "val") for c in "ab"])
    data = make(tmp_path, test="val")
    assert (data.classes, len(data.train), len(data.test)) == (("a", "b"), 2, 2)


@pytest.mark.parametrize("key", ["test", "unlabelled"])
@pytest.mark.parametrize("place", [".", "..", "../set"])
def test_parts_that_hold_the_images_to_learn_from(tmp_path: Path, key: str, place: str) -> None:
    write_pictures(tmp_path / "set", ["a/1.png", "b/1.png"])
    with pytest.raises(UserError, match=rf"dataset.{key} is '.*', where the images to learn from are"):
        make(tmp_path / "set", **{key: place})


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["a/1.png", "b/1.png", "c/1.png"])
    listed = os.scandir

    def closed(place: Any) -> Any:
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"the folder '.*/b' cannot be read \(Permission denied\): make it readable"):
        make(tmp_path)


def test_own_test_folder_inside_the_root_is_not_learned_from(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.png", "b/1.png", "held/a/2.png", "held/b/2.png", "more/9.png"])
    data = make(tmp_path, test="held", unlabelled="more")
    assert names(data) == ["a/1.png", "b/1.png"]
    assert names(data, "test") == ["a/2.png", "b/2.png"]
    assert names(data, "unlabelled") == ["9.png"]
    assert data.unlabelled.labels is None
    everything = data.everything()
    assert everything.labels.tolist() == [0, 1, -1]
    assert np.array_equal(everything.read(2), data.unlabelled.read(0))


def test_held_out_by_seed_in_every_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{c}/{i:02}.png" for c in "ab" for i in range(10)], height=4, width=4)
    first, again, other = (make(tmp_path, test_fraction=0.2, split="draw", seed=seed) for seed in (0, 0, 3))
    assert names(first, "test") == names(again, "test") != names(other, "test")
    assert first.test.labels.bincount().tolist() == [2, 2]
    assert set(names(first)).isdisjoint(names(first, "test"))
    assert len(first.train) == 16


@pytest.mark.parametrize(
    ("files", "changes", "sentence"),
    [
        ([], {}, "holds no image"),
        (["1.png"], {}, "holds 1 image; there has to be more than one"),
        (["1.png", "2.png"], {"test": "held"}, "dataset.test is '.*held', which does not exist"),
        (["a/1.png", "b/2.png", "3.png"], {"labels": "folders"}, "1 images lie directly in"),
        (["a/1.png", "b/2.png", "held/c/1.png"], {"test": "held"}, "has the class 'c', which the images to learn from"),
        (["1.png", "2.png"], {"test_fraction": 1.0}, "test_fraction is 1.0 of 2 images"),
        (["1.png", "2.png"], {"max_unreadable": 2}, "max_unreadable is 2; a share from 0 to 1 was expected"),
        (["1.png", "2.png"], {"mean": (0.5,)}, "dataset.mean is .*; a list of three numbers"),
        (["1.png", "2.png"], {"eval_resize": 8}, "eval_resize is 8, smaller than dataset.image_size=16"),
    ],
)
def test_wrong_folder(tmp_path: Path, files: list[str], changes: dict[str, Any], sentence: str) -> None:
    write_pictures(tmp_path, files)
    with pytest.raises(UserError, match=sentence) as said:
        make(tmp_path, **changes)
    assert "\n" not in str(said.value)


def test_no_root() -> None:
    with pytest.raises(UserError, match=r"add dataset.root=DIR"):
        make(None)


def test_root_that_is_a_file(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png"])
    with pytest.raises(UserError, match=r"1.png', which is a file; name a folder"):
        make(tmp_path / "1.png")


def spoil(root: Path) -> None:
    """Ten images, of which two are none."""
    write_pictures(root, [f"{i}.jpg" for i in range(8)])
    (root / "text.jpg").write_text("this is no image")
    (root / "cut.jpg").write_bytes(encoded(picture(3), quality=95)[:300])


@pytest.mark.parametrize("resident", [False, True])
def test_unreadable_files_are_left_out_and_named(tmp_path: Path, resident: bool) -> None:
    spoil(tmp_path / "set")
    data = make(tmp_path / "set", max_unreadable=0.25, resident=resident)
    assert len(data.train) == 8
    data.unreadable.write_to(tmp_path / "unreadable.txt")
    assert sorted((tmp_path / "unreadable.txt").read_text().splitlines()) == [
        "cut.jpg\tincomplete image",
        "text.jpg\tno image",
    ]


def test_too_many_unreadable_files(tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(
        UserError,
        match=r"2 of 10 files cannot .* such as 'cut.jpg' \(incomplete image\), 'text.jpg' \(no image\): ",
    ):
        make(tmp_path, max_unreadable=0.15)


def test_a_single_unreadable_file_is_no_reason_to_stop(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{i}.jpg" for i in range(5)])
    (tmp_path / "text.jpg").write_text("this is no image")
    assert make(tmp_path, max_unreadable=0.01).about[-1] == "1 unreadable file, 'text.jpg': no image"
    with pytest.raises(UserError, match="1 of 6 files cannot be read"):
        make(tmp_path, max_unreadable=0.0)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UserError, match="2 of 7 files cannot be read"):
        make(tmp_path, max_unreadable=0.01)


def test_only_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    (tmp_path / "b.jpg").write_text("no image")
    with pytest.raises(UserError, match="2 of 2 files"):
        make(tmp_path, max_unreadable=1.0)


def test_names_that_are_no_text_are_reported_as_they_are(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", [f"{i}.jpg" for i in range(9)])
    broken = os.fsencode(tmp_path / "set") + b"/b\xe4d.jpg"
    Path(os.fsdecode(broken)).touch()
    data = make(tmp_path / "set", max_unreadable=0.2)
    data.unreadable.write_to(tmp_path / "unreadable.txt")
    data.unreadable.write_to(tmp_path / "unreadable.txt")
    assert (tmp_path / "unreadable.txt").read_bytes() == b"b\xe4d.jpg\tempty file\n"


def test_a_start_decodes_a_sample_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def counted(path: Path, max_pixels: int) -> np.ndarray:
        decoded.append(path)
        return read_image(path, max_pixels)

    monkeypatch.setattr(inspection, "read_image", counted)
    trailing = encoded(picture(), quality=95) + b"trailing bytes"
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(trailing)
        (tmp_path / f"{i}.webp").write_bytes(encoded(picture(), "WEBP"))
    (tmp_path / "cut.webp").write_bytes(encoded(picture(), "WEBP")[:-20])
    data = make(tmp_path, max_unreadable=0.1)
    assert list(data.unreadable.reasons) == ["cut.webp"]
    assert len(decoded) <= inspection.SAMPLE + 2


def test_most_of_a_sample_unreadable(tmp_path: Path) -> None:
    """Nothing at the ends of a TIFF of floats says that it cannot be read."""
    float_image = Image.fromarray(picture(channels=1)).convert("F")
    for i in range(30):
        (tmp_path / f"{i}.tif").write_bytes(encoded(float_image, "TIFF"))
    with pytest.raises(UserError, match=r"of a sample of \d+ files cannot be read as images, such as .*32 bits"):
        make(tmp_path, max_unreadable=0.1, channels="rgb")


def test_report_grows_as_files_are_met(tmp_path: Path) -> None:
    files = UnreadableFiles(share=0.5, files=4)
    files.add([("a", "no image")])
    files.write_to(tmp_path / "unreadable.txt")
    files.add([("b", "empty file"), ("a", "no image")])
    assert (tmp_path / "unreadable.txt").read_text() == "a\tno image\nb\tempty file\n"
    with pytest.raises(UserError, match=f"named in {tmp_path / 'unreadable.txt'}"):
        files.add([("c", "no image")])
    files.write_to(tmp_path / "unreadable.txt")  # as a resumed run does
    assert len((tmp_path / "unreadable.txt").read_text().splitlines()) == 3
    clean = UnreadableFiles(share=0.5, files=4)
    clean.write_to(tmp_path / "none.txt")
    assert not (tmp_path / "none.txt").exists()


def test_images_in_memory_are_the_files(tmp_path: Path) -> None:
    write_pictures(tmp_path / "same", ["a/1.png", "b/2.png", "b/3.jpg"])
    write_pictures(tmp_path / "sizes", ["a/1.png", "b/2.png"])
    write_pictures(tmp_path / "sizes", ["b/4.png"], height=9, width=11)
    for root in (tmp_path / "same", tmp_path / "sizes"):
        files, kept = make(root), make(root, resident=True)
        assert kept.train.in_memory
        assert not files.train.in_memory
        assert torch.equal(kept.train.labels, files.train.labels)
        assert names(kept) == names(files)
        for i in range(len(files.train)):
            assert np.array_equal(kept.train.read(i), files.train.read(i))
    assert make(tmp_path / "same", resident=True).train.pixels.shape == (3, 3, 24, 32)
    assert make(tmp_path / "sizes", resident=True).train.pixels is None


def test_too_little_memory_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING, "selfsight"):
        data = make(tmp_path, resident=True)
    assert not data.train.in_memory
    assert "they are read as needed" in caplog.text


def test_auto_keeps_only_small_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    assert make(tmp_path, resident="auto").train.in_memory
    monkeypatch.setattr(dataset, "SMALL", 2 * 24 * 32 * 3 - 1)
    assert not make(tmp_path, resident="auto").train.in_memory


@pytest.mark.parametrize("resident", [False, True])
def test_test_images_among_the_unlabelled_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resident: bool
) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"])
    write_pictures(tmp_path / "more", ["u1.png", "u2.png"], first_seed=3)  # u1 has the content of test/b/4.png
    with caplog.at_level(logging.WARNING, "selfsight"):
        data = make(tmp_path, unlabelled=str(tmp_path / "more"), resident=resident)
    assert "1 of the 2 unlabelled images" in caplog.text
    assert data.warn_of_leaks() == 1
    assert duplicates(data.train, data.test) == 0


@pytest.mark.parametrize("resident", [False, True])
def test_copies_of_test_images_are_left_out_of_training_where_that_is_asked(tmp_path: Path, resident: bool) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "train/b/5.png", "test/a/3.png", "test/b/4.png"])
    copied = tmp_path / "test" / "a" / "3.png"
    (tmp_path / "train" / "a" / "same bytes.png").write_bytes(copied.read_bytes())
    told = PngInfo()
    told.add_text("camera", "another one")
    image = Image.open(copied)
    image.save(tmp_path / "train" / "b" / "same pixels.png", pnginfo=told)
    image.save(tmp_path / "train" / "b" / "another format.bmp")
    image.save(tmp_path / "train" / "a" / "a third one.webp", lossless=True)
    kept = ["a/1.png", "b/2.png", "b/5.png"]
    assert len(names(make(tmp_path, resident=resident))) == 7
    data = make(tmp_path, resident=resident, drop_copies=True)
    assert names(data) == kept
    assert data.train.labels.tolist() == [0, 1, 1]
    assert names(data, "test") == ["a/3.png", "b/4.png"]


def test_where_all_files_are_of_one_format_no_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"])
    read: list[object] = []
    monkeypatch.setattr(Image, "open", read.append)
    make(tmp_path, resident=False)
    assert read == []


def test_of_very_many_images_none_is_decoded_to_find_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"])
    Image.open(tmp_path / "test/a/3.png").save(tmp_path / "train/b/3.bmp")
    monkeypatch.setattr(copies, "MOST_DECODED", 2)  # of the one BMP file and two PNG files of its size
    assert len(names(make(tmp_path, resident=False, drop_copies=True))) == 3
    monkeypatch.setattr(copies, "MOST_DECODED", 3)
    assert names(make(tmp_path, resident=False, drop_copies=True)) == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize("resident", [False, True, "auto"])
def test_files_are_compared_without_decoding_them(
    tmp_path: Path, resident: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some of the images lie in memory, and where the unlabelled ones are of two folders."""
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "train/3.png", "test/4.png", "test/5.png"])
    (tmp_path / "labels.csv").write_text("train/1.png,a\ntrain/2.png,b\ntest/4.png,a\ntest/5.png,b\n")
    write_pictures(tmp_path / "more", ["u1.png", "u2.png"], first_seed=4)  # u1 has the content of test/5.png
    data = make(tmp_path, unlabelled="more", resident=resident)
    held = make(tmp_path, resident=True).test
    assert len(data.unlabelled) == 3
    monkeypatch.setattr("selfsight.datamodules.images.sets.read_image", None)
    assert duplicates(data.unlabelled, data.test) == duplicates(data.unlabelled, held) == 1


def test_only_files_of_equal_length_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a/1.png": b"one", "a/2.png": b"four", "b/1.png": b"two", "b/2.png": b"longer"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read: list[bytes] = []
    monkeypatch.setattr(copies, "_digest", lambda content: read.append(content) or content)
    assert duplicates(*(FileImages(tmp_path / part, ["1.png", "2.png"]) for part in "ab")) == 0
    assert sorted(read) == [b"one", b"two"]


def test_images_without_files_are_compared_by_their_pixels() -> None:
    pixels = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(5)])
    same_row = pixels[:1].clone()
    same_row[..., 1:, :] = 0  # alike at a glance only
    several = join(ArrayImages(pixels[3:]), SomeImages(ArrayImages(pixels), torch.tensor([1])), ArrayImages(same_row))
    assert duplicates(several, ArrayImages(pixels[:4])) == 2


def test_all_images_are_joined_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.png", "b/2.png", "more/3.png"])
    data = make(tmp_path, unlabelled="more", resident=True)
    whole = data.everything()
    assert data.everything() is whole
    assert data.num_images == len(whole) == 3
    kept = weakref.ref(whole)
    del whole
    assert kept() is None  # a copy of many images is not held for somebody who may ask again
    data.unlabelled = None
    assert data.num_images == len(data.everything()) == 2


def test_what_can_be_measured_is_told(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(4)])
    told = {
        (data.held_out, data.labelled)
        for data in (
            make(tmp_path, test_fraction=0.25),
            make(tmp_path),
            make(tmp_path, labels="none", test_fraction=0.5),
        )
    }
    assert told == {(True, True), (False, False), (True, False)}


def test_one_image_a_class_leaves_none_to_hold_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{c}/1.png" for c in "abcd"])
    with pytest.raises(
        UserError, match="none of the 4 images can be held out, since each is the only one of its class"
    ):
        make(tmp_path, test_fraction=0.25)


def test_selection_keeps_names_labels_and_content(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.png", "a/2.png", "b/3.png"])
    data = make(tmp_path).train
    assert isinstance(data, FileImages)
    some = data.select([2, 0])
    assert [some.name(i) for i in range(2)] == ["b/3.png", "a/1.png"]
    assert some.labels.tolist() == [1, 0]
    assert np.array_equal(some.read(0), data.read(2))


def test_unusual_names(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["ä ö/1 2.png", "日本/x.PNG"])
    data = make(tmp_path)
    assert data.classes == ("ä ö", "日本")
    assert data.train.read(1).shape == (24, 32, 3)


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled", "train/unlabeled"])
def test_unlabelled_is_no_class(tmp_path: Path, name: str) -> None:
    """A folder of that name beside class folders holds further images to learn from."""
    top = "train/" if "/" in name else ""
    write_pictures(tmp_path, [f"{top}a/1.png", f"{top}b/2.png", f"{top}b/3.png", f"{name}/4.png", f"{name}/5.png"])
    data = make(tmp_path, test_fraction=0)
    assert data.classes == ("a", "b")
    assert data.class_counts("train") == [1, 2]
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 2
    assert "2 images without labels" in " ".join(data.about)


def test_a_table_may_name_what_lies_in_unlabelled(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.png", "b/2.png", "unlabelled/3.png"])
    (tmp_path / "labels.csv").write_text("path,label\na/1.png,x\nb/2.png,y\nunlabelled/3.png,y\n")
    data = make(tmp_path, test_fraction=0)
    assert data.class_counts("train") == [1, 2]
    assert data.unlabelled is None
