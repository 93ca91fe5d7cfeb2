"""Who keeps a label: amounts are exact, the same seed draws the same, and what cannot be is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight.datamodules import ArrayImages, LabelSplit, select_labels
from selfsight.datamodules.datasets.lists import list_digest
from selfsight.datamodules.datasets.splits import allocate, chosen_labels, hold_out, usb_split
from selfsight.datamodules.images.sets import ImageSet
from selfsight.errors import UserError


def labelled(labels: list[int] | Tensor, names: list[str] | None = None) -> ImageSet:
    labels = torch.as_tensor(labels)
    return ArrayImages(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, names)


UNEVEN = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


def counts(split: LabelSplit, labels: Tensor = UNEVEN) -> list[int]:
    return labels[split.tensor()].bincount().tolist()


@pytest.mark.parametrize("rule", ["balanced", "first_k", "usb", "torchssl"])
def test_as_many_of_each_class(rule: str) -> None:
    split = select_labels(labelled(UNEVEN), rule=rule, per_class=4)
    assert counts(split) == [4, 4, 4]
    assert len(set(split.indices)) == 12
    assert select_labels(labelled(UNEVEN), rule=rule, total=12).indices == split.indices


@pytest.mark.parametrize("rule", ["balanced", "proportional", "usb", "torchssl"])
def test_seed_decides(rule: str) -> None:
    first, again, other = (select_labels(labelled(UNEVEN), rule=rule, total=12, seed=seed) for seed in (0, 0, 1))
    assert first.indices == again.indices
    assert set(first.indices) != set(other.indices)


def test_fractions() -> None:
    images = labelled(UNEVEN)
    assert counts(select_labels(images, rule="proportional", fraction=0.1)) == [5, 3, 2]
    assert sorted(counts(select_labels(images, rule="balanced", fraction=0.1))) == [3, 3, 4]
    assert counts(select_labels(images, rule="first_percent", fraction=0.01)) == [1, 1, 1]
    assert counts(select_labels(images, rule="proportional", fraction=1.0)) == [50, 30, 20]


def test_classes_of_one_more_are_drawn() -> None:
    images = labelled(torch.arange(10).repeat(10))
    labels = torch.arange(10).repeat(10)
    lucky = {
        labels[select_labels(images, total=11, seed=seed).tensor()].bincount().argmax().item() for seed in range(20)
    }
    assert len(lucky) > 3


def test_first_k_is_the_order_of_the_set() -> None:
    assert select_labels(labelled([1, 0, 0, 1, 1, 0]), rule="first_k", per_class=2).indices == (0, 1, 2, 3)


def test_unlabelled_images_are_never_chosen() -> None:
    labels = torch.tensor([-1, 0, 1, -1, 1, 0])
    split = select_labels(labelled(labels), per_class=2)
    assert set(split.indices) == {1, 2, 4, 5}


def test_usb_trains_without_labels_on_both_parts() -> None:
    chosen, rest = usb_split(UNEVEN, [2, 2, 2], 0)
    assert sorted(torch.cat([chosen, rest]).tolist()) == list(range(100))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fraction": 0.02, "rule": "proportional"}, "class 'b' would be left without any label"),
        ({"total": 2}, "would be left without any label"),
        ({"per_class": 21}, "class 'c' has 20 images and 21 labels are asked for"),
        ({"total": 101, "rule": "proportional"}, "101 labels are asked for .* and 100 exist"),
        ({"fraction": 1.5}, "labels.fraction is 1.5"),
        ({"per_class": 0}, "labels.per_class is 0; a whole number of at least 1 was expected"),
        ({"per_class": 1.5}, "labels.per_class is 1.5; a whole number"),
        ({"total": "many"}, "labels.total is 'many'; a whole number"),
        ({"fraction": 0}, "labels.fraction is 0; a share above 0 and at most 1"),
        ({"per_class": 1, "seed": -1}, "labels.seed is -1; a whole number"),
        ({}, "give one of labels.per_class"),
        ({"per_class": 1, "total": 3}, "give one of labels.per_class"),
        ({"total": 10, "rule": "usb"}, "10 is no multiple"),
        ({"rule": "balance", "per_class": 1}, "Did you mean 'balanced'"),
        ({"rule": "list"}, "use labels.list=FILE"),
        ({"rule": "first_percent", "total": 5}, "takes labels.fraction"),
    ],
)
def test_impossible_choices(options: dict[str, Any], sentence: str) -> None:
    labels = UNEVEN if "fraction" not in options else torch.tensor([0] * 98 + [1, 2])
    with pytest.raises(UserError, match=sentence) as said:
        select_labels(labelled(labels), classes=("a", "b", "c"), **options)
    assert "\n" not in str(said.value)


def test_class_without_images() -> None:
    with pytest.raises(UserError, match="class 'b' has 0 images"):
        select_labels(labelled([0, 0, 2, 2]), per_class=1, classes=("a", "b", "c"))


def test_images_without_labels() -> None:
    images = ArrayImages(torch.zeros(3, 3, 1, 1, dtype=torch.uint8))
    with pytest.raises(UserError, match="no labels to choose from"):
        select_labels(images, per_class=1)


TREE = [f"n0{c}/n0{c}_{i}.JPEG" for c in (1, 2) for i in range(3)]
TREE_LABELS = [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "lines",
    [
        ["n02_1.JPEG", "n01_0.JPEG", "n01_2.JPEG"],
        ["n02/n02_1.JPEG", "n01/n01_0.JPEG", "n01/n01_2.JPEG"],
        ["train/n02/n02_1.JPEG 1", "train/n01/n01_0.JPEG 0", "train/n01/n01_2.JPEG 0"],
        ["n02/n02_1.JPEG,1", "n01/n01_0.JPEG,0", "n01/n01_2.JPEG,0"],
        ["./n02/n02_1.JPEG, a name", "n01\\n01_0.JPEG,a name", "/data/n01/n01_2.JPEG,a name"],
    ],
    ids=["names", "class and name", "path and label", "csv", "other ways"],
)
def test_lists_of_names(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    split = select_labels(labelled(TREE_LABELS, TREE), rule="list", file=tmp_path / "list.txt")
    assert split.indices == (0, 2, 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "n01_0.JPEG\nn02_7.JPEG\nn09_0.JPEG\n",
            "2 of 3 names in .* are not in the data set: 'n02_7.JPEG', 'n09_0.JPEG'",
        ),
        ("n01_0.JPEG\nn02_0.JPEG\nn01_0.JPEG\n", "1 images stand in .* twice: 'n01/n01_0.JPEG'"),
        ("n01_0.JPEG\n", "class '1' would be left without any label"),
        ("\n", "names no image"),
        (",\nn01_0.JPEG\n/\n", "2 of 3 names in .* are not in the data set: ',', '/'"),
        ("\xe4.JPEG\n".encode("latin-1"), "list.txt' is no text in UTF-8"),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        select_labels(labelled(TREE_LABELS, TREE), rule="list", file=tmp_path / "list.txt")


def test_name_of_several_images_needs_its_class(tmp_path: Path) -> None:
    images = labelled([0, 1], ["a/1.png", "b/1.png"])
    (tmp_path / "list.txt").write_text("1.png\n")
    with pytest.raises(UserError, match=r"fit several images: '1.png'; write class/name"):
        select_labels(images, rule="list", file=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("b/1.png\na/1.png\n")
    assert select_labels(images, rule="list", file=tmp_path / "list.txt").indices == (0, 1)


def test_images_of_one_name_are_told_apart_by_whole_folders(tmp_path: Path) -> None:
    images, file = labelled([0, 1, 1], ["bobcat/1.png", "cat/1.png", "cat/2.png"]), tmp_path / "list.txt"
    for line in ("bobcat/2.png", "dog/2.png", "bobcat/2.png 0"):  # bobcat/2.png is held out, say
        file.write_text(f"cat/1.png\n{line}\n")
        with pytest.raises(UserError, match=rf"1 of 2 names in .* are not in the data set: '{line}'"):
            select_labels(images, rule="list", file=file)
    file.write_text("train/bobcat/1.png\n/data/train/cat/1.png\n")
    assert select_labels(images, rule="list", file=file).indices == (0, 1)


def test_a_list_may_name_fewer_or_more_folders(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    deep = labelled([0, 1], ["x/a/1.png", "y/a/1.png"])
    file.write_text("a/1.png\n")
    with pytest.raises(UserError, match=r"fit several images: 'a/1.png'"):
        select_labels(deep, rule="list", file=file)
    file.write_text("x/a/1.png\ny/a/1.png\n")
    assert select_labels(deep, rule="list", file=file).indices == (0, 1)
    exact = labelled([0, 1], ["a/1.png", "x/a/1.png"])
    file.write_text("a/1.png\nx/a/1.png\n")
    assert select_labels(exact, rule="list", file=file).indices == (0, 1)
    flat = labelled([0, 1], ["1.png", "2, b.png"])
    file.write_text("train/a/1.png\n2, b.png\n")
    assert select_labels(flat, rule="list", file=file).indices == (0, 1)


def test_list_is_verified(tmp_path: Path) -> None:
    images, file = labelled(TREE_LABELS, TREE), tmp_path / "list.txt"
    file.write_text("n02_1.JPEG\nn01_0.JPEG\n")
    digest = list_digest(["x/n01_0.JPEG", "n02_1.JPEG"])
    assert select_labels(images, rule="list", file=file, sha256=digest).indices == (0, 4)
    with pytest.raises(UserError, match=r"has the SHA-256 .*, but labels.sha256=imagenet_1percent is 6581e723dbf2"):
        select_labels(images, rule="list", file=file, sha256="imagenet_1percent")


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt', which does not exist"):
        select_labels(labelled(TREE_LABELS, TREE), rule="list", file=tmp_path / "none.txt")


def test_written_split_is_read_for_the_same_set_only(tmp_path: Path) -> None:
    images, path = labelled(UNEVEN), tmp_path / "labels.json"
    split = select_labels(images, per_class=3, seed=5)
    split.write(path)
    assert LabelSplit.read(path, images) == split
    assert chosen_labels(images, {"split": str(path), "per_class": None}).indices == split.indices
    with pytest.raises(UserError, match="made for another set of 100 images"):
        LabelSplit.read(path, labelled(UNEVEN.flip(0)))
    path.write_text("{}")
    with pytest.raises(UserError, match="is no label split"):
        LabelSplit.read(path, images)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        LabelSplit.read(tmp_path / "none.json", images)


def test_shares_sum_up() -> None:
    available = torch.tensor([7, 1, 2])
    for total in range(11):
        share = allocate(available, total)
        assert int(share.sum()) == total
        assert bool(((share - available * total / 10).abs() < 1).all())


def test_class_of_one_stays_to_learn_from() -> None:
    labels = torch.tensor([0] * 9 + [1])
    for seed in range(5):
        kept, held = hold_out(labels, 10, 0.5, seed)
        assert 9 in kept.tolist()
        assert sorted(kept.tolist() + held.tolist()) == list(range(10))
