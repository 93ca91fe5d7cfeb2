"""Tables of several labels an image, and of numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from selfsight.contracts import Targets
from selfsight.datamodules.datasets.manifest import Manifest
from selfsight.datamodules.datasets.splits import hide_labels, select_labels
from selfsight.errors import UserError

from .test_folder import make
from .writers import write_pictures

NAMES = [f"{i}.png" for i in range(6)]


def of_table(root: Path, table: str, **options: object) -> Targets:
    """The targets of the images called `NAMES`, in this order."""
    write_pictures(root, NAMES)
    (root / "labels.csv").write_text(table)
    data = make(root, test_fraction=0, **options)
    assert data.targets is not None
    assert data.classes == ()
    assert data.num_classes == 0
    assert data.facts["num_classes"] == len(data.targets.names)
    return data.targets


def as_lists(targets: Targets) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in targets.values.tolist()]


def test_labels_with_a_bar_between(tmp_path: Path) -> None:
    table = "".join(
        f"{name},{cell}\n" for name, cell in zip(NAMES, ["b|a", "a", "|", "c | b", "a|a", "b"], strict=True)
    )
    targets = of_table(tmp_path, table)
    assert (targets.kind, targets.names) == ("multilabel", ("a", "b", "c"))
    assert as_lists(targets) == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0]]


def test_a_column_for_each_label(tmp_path: Path) -> None:
    rows = ["1,0", "0,1", "1,1", "0,0", ",1", "0,"]
    targets = of_table(tmp_path, "file,cat,dog\n" + "".join(f"{n},{r}\n" for n, r in zip(NAMES, rows, strict=True)))
    assert (targets.kind, targets.names) == ("multilabel", ("cat", "dog"))
    assert as_lists(targets) == [[1, 0], [0, 1], [1, 1], [0, 0], [None, 1], [0, None]]


def test_columns_of_numbers(tmp_path: Path) -> None:
    rows = ["1.5,-2", "0,1e3", "1,", "0,0", "7,1", "0,3"]
    targets = of_table(tmp_path, "file,age,height\n" + "".join(f"{n},{r}\n" for n, r in zip(NAMES, rows, strict=True)))
    assert (targets.kind, targets.names) == ("regression", ("age", "height"))
    assert as_lists(targets) == [[1.5, -2], [0, 1000], [1, None], [0, 0], [7, 1], [0, 3]]


@pytest.mark.parametrize(
    ("task", "cells", "kind"),
    [
        ("auto", ["0.5", "1", "2", "3", "4", "5"], "regression"),  # no class is called 0.5
        ("regression", ["0", "1", "2", "3", "4", "5"], "regression"),
        ("multilabel", ["a", "b", "c", "a", "b", "c"], "multilabel"),
    ],
)
def test_what_a_single_column_is(tmp_path: Path, task: str, cells: list[str], kind: str) -> None:
    table = "".join(f"{name},{cell}\n" for name, cell in zip(NAMES, cells, strict=True))
    assert of_table(tmp_path, table, task=task).kind == kind


def test_whole_numbers_are_classes_as_ever(tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    (tmp_path / "labels.csv").write_text("".join(f"{name},{i % 2}\n" for i, name in enumerate(NAMES)))
    data = make(tmp_path, test_fraction=0)
    assert (data.classes, data.targets) == (("0", "1"), None)


def test_images_of_which_nothing_is_known_are_further_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    (tmp_path / "labels.csv").write_text("file,age,height\n0.png,1,2\n1.png,,3\n2.png,,\n")
    data = make(tmp_path, test_fraction=0)
    assert len(data.train) == 2
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 4
    assert data.unlabelled.targets is None
    everything = data.everything()
    assert everything.targets is not None
    assert everything.targets.known.tolist() == [True, True, False, False, False, False]


def test_test_images_have_the_columns_of_those_to_learn_from(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/1.png", "test/2.png"])
    (tmp_path / "train/labels.csv").write_text("1.png,b|a\n2.png,c\n")
    (tmp_path / "test/labels.csv").write_text("1.png,c|b\n2.png,|\n")
    data = make(tmp_path)
    assert data.test is not None
    assert data.test.targets is not None
    assert data.test.targets.names == ("a", "b", "c")
    assert as_lists(data.test.targets) == [[0, 1, 1], [0, 0, 0]]
    (tmp_path / "test/labels.csv").write_text("1.png,c|d\n2.png,|\n")
    with pytest.raises(UserError, match="has 'd', which the images to learn from do not have"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("table", "task", "sentence"),
    [
        (
            "file,age,height\n0.png,1.5,tall\n1.png,2,3\n",
            "auto",
            "line 2 of .* has 'tall' in the column 'height', where a n",
        ),
        (
            "0.png,1.5\n1.png,old\n",
            "regression",
            "line 2 of .* has 'old' in the column 'value', where a number was exp",
        ),
        ("0.png,nan\n1.png,1\n", "regression", "has 'nan' in the column 'value'"),
        ("f,cat,dog\n0.png,1,2\n1.png,0,1\n", "multilabel", "has '2' in the column 'dog', where 0 or 1 was expected"),
        ("f,cat,dog\n0.png,1,1\n1.png,0\n", "auto", "line 3 of .* has 2 columns; path,cat,dog are expected"),
        (
            "f,cat,dog\n0.png,1,1\n1.png,0,1\n",
            "classes",
            "has 3 columns; path,label are expected of dataset.task=classes",
        ),
        ("0.png,1,1\n1.png,0,1\n", "auto", "or a first line with the names of the columns"),
        ("f,a,b\n0.png,,\n1.png,,\n", "auto", "gives no image a label"),
    ],
)
def test_wrong_tables(tmp_path: Path, table: str, task: str, sentence: str) -> None:
    write_pictures(tmp_path, ["0.png", "1.png"])
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=sentence) as said:
        make(tmp_path, task=task)
    assert "\n" not in str(said.value)


def test_a_task_without_a_table(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/0.png", "b/1.png"])
    with pytest.raises(UserError, match=r"dataset.task is regression, and .* has no labels.csv"):
        make(tmp_path, task="regression")
    with pytest.raises(UserError, match=r"dataset.task is 'numbers'; auto, classes, multilabel or regression"):
        make(tmp_path, task="numbers")


def test_a_run_goes_on_with_the_numbers_it_began_with(tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    table = "file,age\n" + "".join(f"{name},{i}.5\n" for i, name in enumerate(NAMES[:5]))
    (tmp_path / "labels.csv").write_text(table)
    before = make(tmp_path, test_fraction=0.3)
    then = Manifest.of(json.loads(json.dumps(before.manifest())))
    assert not make(tmp_path, test_fraction=0.3).compare(then)
    (tmp_path / "labels.csv").write_text(table.replace("2.5", "40"))
    now = make(tmp_path, test_fraction=0.3)
    assert now.fingerprint() != before.fingerprint()
    assert now.compare(then).relabelled == ["2.png"]
    again = now.as_recorded(then)
    for part, images in before.parts().items():
        other = again.split(part).targets
        assert (images.targets is None) == (other is None)
        if images.targets is not None and other is not None:
            assert torch.equal(other.values, images.targets.values)


def test_some_keep_their_numbers(tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    (tmp_path / "labels.csv").write_text("file,age\n" + "".join(f"{name},{i}.5\n" for i, name in enumerate(NAMES)))
    data = make(tmp_path, test_fraction=0)
    assert len(select_labels(data.train, rule="all")) == 6
    split = select_labels(data.train, fraction=0.5)
    assert split == select_labels(data.train, fraction=0.5)
    few = hide_labels(data, split)
    assert few.targets is not None
    assert few.targets.values.flatten().tolist() == [i + 0.5 for i in split.indices]
    assert few.unlabelled is not None
    assert few.unlabelled.targets is None
    for options in ({"per_class": 1}, {"rule": "usb", "total": 3}):
        with pytest.raises(UserError, match=r"draws from one class after the other"):
            select_labels(data.train, **options)
    with pytest.raises(UserError, match=r"9 labels are asked for .* and 6 exist"):
        select_labels(data.train, total=9)
