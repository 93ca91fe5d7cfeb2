"""Labels from a table, from class folders, or none; what looks like labels and is none is said."""

from __future__ import annotations

import logging
import re
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest

from selfsight.errors import UserError

from .test_folder import make, names
from .writers import encoded, picture, write_pictures

PARTS = ["train/1.png", "train/2.png", "test/1.png", "test/2.png"]


def test_labels_from_a_list(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "x/3.png", "4.png", "5.png"])
    (tmp_path / "labels.csv").write_text(f"path,label\n2.png,oak\nx/3.png,elm\n{tmp_path}/1.png,oak\n4.png,-1\n")
    data = make(tmp_path)
    assert data.classes == ("elm", "oak")
    assert names(data) == ["1.png", "2.png", "x/3.png"]
    assert data.train.labels.tolist() == [1, 1, 0]
    assert names(data, "unlabelled") == ["4.png", "5.png"]
    assert data.unlabelled.labels is None


@pytest.mark.parametrize(("stored", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_that_look_the_same_are_the_same(tmp_path: Path, stored: Literal["NFC"], written: Literal["NFC"]) -> None:
    files = ["Zürich/café.png", "Zürich/thé.png", "naïf.png"]
    write_pictures(tmp_path, [unicodedata.normalize(stored, name) for name in files])
    rows = [f"{name},{label}" for name, label in zip(files, ("é", "é", "o"), strict=True)]
    (tmp_path / "labels.csv").write_text(unicodedata.normalize(written, "\n".join(rows)))
    data = make(tmp_path)
    assert names(data) == sorted(unicodedata.normalize(stored, name) for name in files)
    assert sorted(data.class_counts("train")) == [1, 2]
    named = tmp_path / "some.txt"
    named.write_text(unicodedata.normalize(written, "\n".join(files[:2])))
    assert len(make(tmp_path, only=str(named)).train) == 2


@pytest.mark.parametrize("heading", ["", "path,label\n", "image_id,breed\n"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_headings_and_marks_of_spreadsheets(tmp_path: Path, heading: str, ends: str) -> None:
    write_pictures(tmp_path, ["a, 1.png", "2.png"])
    text = f'{heading}"a, 1.png","oak, old"\n\n2.png,elm\n'.replace("\n", ends)
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = make(tmp_path)
    assert [data.classes[int(i)] for i in data.train.labels] == ["elm", "oak, old"]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("1.png,a\n9.png,b\n", "line 2 .* names '9.png', which does not exist"),
        ("id,label\n1,a\n2,b\n", "line 2 .* names '1', which does not exist"),
        ("1.png,a\nnotes.txt,b\n", "line 2 .* names 'notes.txt', which is no image"),
        ("1.png,a\n1.png,b\n", "names '1.png' twice"),
        ("1.png,a\n./1.png,b\n", "names './1.png' twice"),
        ("1.png,a,b\n", "3 columns; path,label are expected"),
        ("1.png;a\n", "1 column; path,label are expected, with a comma between"),
        ("1.png,-2\n", "label -2; only -1"),
        ("1.png,\n2.png,-1\n", "gives no image a label"),
        ("more/3.png,a\n", "gives no image in '.*' a label"),
        ("", "gives no image a label"),
        ("1.png,a\n", "are of one class, 'a', and telling classes apart takes two"),
        ("1.png,a\n2.png,a\n", "are of one class, 'a', and telling classes apart takes two"),
        ("1.png,\xe9t\xe9\n".encode("latin-1"), "labels.csv' is no text in UTF-8: save it again in this encoding"),
        ("1.png,a\n2.png,b\n".encode("utf-16"), "is no text in UTF-8"),
        ("1.png,a\n2.png,b\n".encode("utf-16-le"), "is no text in UTF-8"),
        (f"1.png,{'a' * 200_000}\n", "line 1 .* is no row of a table"),
    ],
)
def test_wrong_list(tmp_path: Path, table: str | bytes, sentence: str) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "more/3.png"])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(UserError, match=sentence) as said:
        make(tmp_path, unlabelled="more", test_fraction=0.1)
    assert "\n" not in str(said.value)


def test_list_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").touch()

    def closed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", closed)
        with pytest.raises(UserError, match=r"labels.csv' cannot be read \(Permission denied\)"):
            make(tmp_path)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("my.csv", r"dataset.labels names the file '.*my.csv', which does not exist"),
        ("folder", r"folder', which does not exist\. Did you mean 'folders'\?"),
        (None, "dataset.labels is null; auto, folders, none or the path of a CSV file was expected"),
        (True, "dataset.labels is true; auto, folders"),
    ],
)
def test_rules_that_are_none(tmp_path: Path, rule: Any, sentence: str) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, labels=rule)


@pytest.mark.parametrize("rule", ["auto", "labels.csv", "absolute"])
def test_a_list_in_the_root_labels_both_parts(tmp_path: Path, rule: str) -> None:
    write_pictures(tmp_path, [*PARTS, "val/1.png"])
    rows = [f"{path},{'ab'[int(path[-5]) - 1]}" for path in (*PARTS, "val/1.png")]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = make(tmp_path, labels=str(tmp_path / "labels.csv") if rule == "absolute" else rule)
    assert data.classes == ("a", "b")
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]
    assert data.about_labels == f"labels from '{tmp_path / 'labels.csv'}'"


def test_a_list_in_the_folder_of_each_part(tmp_path: Path) -> None:
    write_pictures(tmp_path, PARTS)
    for part, labels in (("train", "ab"), ("test", "ba")):
        (tmp_path / part / "labels.csv").write_text(f"1.png,{labels[0]}\n2.png,{labels[1]}\n")
    data = make(tmp_path)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1, 0])


def test_a_list_and_a_test_folder_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["new/1.png", "new/2.png", "held/1.png", "held/2.png"])
    (tmp_path / "labels.csv").write_text("new/1.png,a\nnew/2.png,b\nheld/1.png,b\nheld/2.png,a\n")
    data = make(tmp_path, test="held")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1, 0])


def test_a_list_for_training_and_class_folders_for_the_test(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/b/1.png", "test/a/2.png"])
    (tmp_path / "labels.csv").write_text("train/1.png,a\ntrain/2.png,b\n")
    assert make(tmp_path).test.labels.tolist() == [0, 1]


def test_test_images_without_a_label_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, PARTS)
    (tmp_path / "labels.csv").write_text("train/1.png,a\ntrain/2.png,b\ntest/2.png,b\n")
    with caplog.at_level(logging.WARNING, "selfsight"):
        data = make(tmp_path)
    assert (names(data, "test"), data.test.labels.tolist()) == (["2.png"], [1])
    assert "1 test images in" in caplog.text


@pytest.mark.parametrize("resident", [False, True])
def test_a_list_may_name_damaged_files(tmp_path: Path, resident: bool) -> None:
    write_pictures(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "3.png").write_bytes(encoded(picture(), "PNG")[:100])
    (tmp_path / "labels.csv").write_text("".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6)))
    data = make(tmp_path, max_unreadable=0.2, resident=resident)
    assert data.train.labels.tolist() == [0, 1, 0, 0, 1]
    assert list(data.unreadable.reasons) == ["3.png"]


def test_classes_of_equal_numbers_have_one_order(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{c}/1.png" for c in ("1", "01", "001", "0001", "2")])
    assert make(tmp_path).classes == ("0001", "001", "01", "1", "2")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["a/1.png", "b/1.png", "2.png"], "1 of 3 images in '.*' lie outside its class folders: move them"),
        (["1.png", "2.png", "animals.csv"], "has no labels.csv, and 'animals.csv' was not read: set dataset.labels="),
        (
            ["set/a/1.png", "set/b/2.png"],
            "all images lie in '.*set': set dataset.root=.*set if its folders are classes",
        ),
    ],
)
def test_what_looks_like_labels_and_is_none_is_said(
    tmp_path: Path, files: list[str], hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path, [file for file in files if file.endswith(".png")])
    for file in files:
        (tmp_path / file).touch()
    with caplog.at_level(logging.WARNING, "selfsight"):
        data = make(tmp_path)
    assert data.train.labels is None
    (record,) = caplog.records
    assert re.search(hint, record.getMessage())
    assert data.about_labels.startswith("no labels: ")


def test_plain_folders_warn_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "flat", ["1.png", "2.png"])
    write_pictures(tmp_path / "classes", ["a/1.png", "b/1.png"])
    with caplog.at_level(logging.WARNING, "selfsight"):
        flat, classes = make(tmp_path / "flat"), make(tmp_path / "classes")
        silent = make(tmp_path / "classes", labels="none")
    assert not caplog.records
    assert "lie in no class folders" in flat.about_labels
    assert classes.about_labels == f"labels from the folders in '{tmp_path / 'classes'}'"
    assert silent.about_labels == "no labels: dataset.labels=none"


def test_test_folder_without_labels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/1.png", "test/1.png"])
    with caplog.at_level(logging.WARNING, "selfsight"):
        data = make(tmp_path)
    assert "have no labels, so that nothing can be measured which needs them" in caplog.text
    assert data.test.labels is None
    assert not data.labelled
