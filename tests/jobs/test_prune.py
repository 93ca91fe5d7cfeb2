"""`selfsight prune`: a list of the images to keep, which a run then learns from; and a page of what goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight import cli
from selfsight.datamodules import folder
from selfsight.datamodules.datasets.lists import lines_of
from selfsight.errors import UserError
from selfsight.evaluation.pruning import choose

from .test_evaluate import finished, refused

#: images of each class: plain ones, and ones like no other
PLAIN, ODD = {"a": 6, "b": 5, "c": 3}, {"a": 4, "b": 2, "c": 0}


def drawn(root: Path) -> Path:
    """Even grey images, nearly the same, and stripes of strong colours."""
    rng = np.random.default_rng(0)
    for name in PLAIN:
        (root / name).mkdir(parents=True)
        for i in range(PLAIN[name]):
            Image.fromarray(rng.integers(120, 124, (16, 16, 3)).astype(np.uint8)).save(root / name / f"plain {i}.png")
        for i in range(ODD[name]):
            pixels = np.zeros((16, 16, 3), np.uint8)
            pixels[i % 3 :: 2, :, i % 3] = 255
            Image.fromarray(pixels).save(root / name / f"odd, {i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prune")
    return finished(
        place / "run", "dataset=folder", f"dataset.root={drawn(place / 'photos')}", "dataset.test_fraction=0"
    )


def kept(run: Path, out: Path, *words: str) -> set[str]:
    """What `selfsight prune` lists with one prototype, the middle of all."""
    cli.main(["prune", f"run={run}", f"out={out}", "prototypes=1", *words])
    return set(out.read_text().splitlines())


def test_hard_and_easy_are_opposite_ends(run: Path, tmp_path: Path) -> None:
    every = {str(path.relative_to(run.parent / "photos")) for path in run.parent.glob("photos/*/*.png")}
    odd = {path for path in every if "odd" in path}
    easy = kept(run, tmp_path / "easy.txt", "keep=0.7", "rule=easy")
    assert easy == every - odd
    hard = kept(run, tmp_path / "hard.txt", "keep=0.5", "balance=0.3")
    assert odd < hard
    assert len(hard) == 10


def test_a_class_is_not_lost_in_silence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "prune", f"run={run}", f"out={tmp_path}/x.txt", "prototypes=1", "keep=0.3")
    lost = "Keeping 6 of 20 images leaves 1 of 3 classes without any, the first is 'c'"
    assert f"{lost}: keep more, or set balance=0.5." in told
    assert not list(tmp_path.iterdir())
    even = kept(run, tmp_path / "even.txt", "keep=0.3", "balance=1")
    assert [sum(path.startswith(name) for path in even) for name in "abc"] == [2, 2, 2]
    assert "classes of 2 to 2 images, evenness 1.00; they had 3 to 10, 0.48" in capsys.readouterr().out


def test_a_run_learns_from_the_list(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["prune", f"run={run}", "keep=0.6", "rule=easy", "prototypes=1"])
    out = run / "pruned" / "easy-0.6.txt"
    told = capsys.readouterr().out
    assert f"12 of 20 images kept: {out}" in told
    assert f"the words of the run and dataset.only={out}" in told
    page = out.with_suffix(".html").read_text()
    assert page.count("<figure") >= 20  # each image goes or stays
    assert "What goes: the least typical" in page
    words = [f"dataset.root={run.parent / 'photos'}", f"dataset.only={out}", "dataset.test_fraction=0", "batch_size=4"]
    words += ["backbone.width=4", "debug=smoke", "report=false", "evaluator=knn", f"runs={tmp_path}", "name=less"]
    cli.main(["pretrain", "dataset=folder", *words])
    assert f"12 of 20 images to learn from, those in '{out}'" in capsys.readouterr().out.replace("\n", " ")
    record = json.loads((tmp_path / "less" / "data.json").read_text())
    assert sorted(record["parts"]["train"]["paths"]) == out.read_text().splitlines()


def test_a_remedy_is_one() -> None:
    score, labels = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="the first is 'b': keep more, or set balance=1") as said:
        choose(score, 0.5, labels=labels, classes=2, names="ab")
    assert "balance=0.5" not in str(said.value)
    assert choose(score, 0.5, labels=labels, classes=2, balance=1).tolist() == [0, 2]
    with pytest.raises(UserError, match=r"the first is number 1: keep more\."):
        choose(score, 0.25, labels=labels, classes=2, balance=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["keep=0"], "keep is 0; a share above 0 and at most 1 was expected"),
        (["keep=1.5"], "keep is 1.5; a share above 0 and at most 1 was expected"),
        (["rule=hrad"], "Did you mean 'hard'?"),
        (["balance=2"], "balance is 2; a share from 0 to 1 was expected"),
        (["prototypes=21"], "prototypes is 21, and there are 20 images"),
        (["stage=all"], "stage is 'all'"),
        (["out=page.html"], "out is 'page.html'"),
        (["PHOTOS", "balance=0.5"], "have no classes to balance"),
        (["PHOTOS", "keep=0.05"], "keep 0.05 of 20 images is 1, and a method learns from two"),
        (["dataset=digits"], "images of 'digits' have numbers and no file names"),
        (["PHOTOS", "dataset.only=nowhere.txt"], "dataset.only is 'nowhere.txt', which does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_kept(run: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "PHOTOS":
        place = f"dataset.root={run.parent / 'photos'}"
        words = ["dataset=folder", place, "dataset.labels=none", "dataset.test_fraction=0", *words[1:]]
    assert told in refused(capsys, "prune", f"run={run}", *words)


def test_weights_without_a_place_for_the_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dataset=folder", f"dataset.root={run.parent / 'photos'}"]
    assert "say where the list goes: out=kept.txt" in refused(capsys, "prune", f"weights={run}", *words)


def test_names_that_are_no_line() -> None:
    assert lines_of(["a/1, 2.png", "b/ö x.png"]) == "a/1, 2.png\nb/ö x.png\n"
    for name in ("a\nb.png", " a.png", "a\u2028b.png", "\udcff.png"):
        with pytest.raises(UserError, match="no line of a list can hold"):
            lines_of([name])


# --- dataset.only -----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return drawn(tmp_path / "photos")


def listing(place: Path, *lines: str) -> Path:
    place.write_text("".join(f"{line}\n" for line in lines))
    return place


@pytest.mark.parametrize("split", ["hash", "draw"])
def test_the_list_leaves_what_is_held_out_alone(photos: Path, tmp_path: Path, split: str) -> None:
    whole = folder(photos, test_fraction=0.3, split=split)
    some = [whole.train.name(i) for i in range(0, len(whole.train), 2)]
    data = folder(photos, test_fraction=0.3, split=split, only=listing(tmp_path / "list.txt", *reversed(some)))
    assert [data.train.name(i) for i in range(len(data.train))] == some
    assert whole.test is not None
    assert data.test is not None
    assert [data.test.name(i) for i in range(len(data.test))] == [whole.test.name(i) for i in range(len(whole.test))]
    assert data.classes == whole.classes
    assert data.fingerprint() != whole.fingerprint()
    held = whole.test.name(0)
    with pytest.raises(UserError, match=rf"1 of 2 names .* are not among the images to learn from .*: '{held}'"):
        folder(photos, test_fraction=0.3, split=split, only=listing(tmp_path / "list.txt", some[0], held))


def test_images_without_labels_can_be_listed_too(photos: Path, tmp_path: Path) -> None:
    (photos / "c").rename(photos / "unlabelled")
    lines = ["a/plain 0.png", "b/plain 0.png", "unlabelled/plain 0.png"]
    data = folder(photos, test_fraction=0, only=listing(tmp_path / "list.txt", *lines))
    assert (len(data.train), len(data.unlabelled or ())) == (2, 1)
    assert data.train.addresses(photos) + data.split("unlabelled").addresses(photos) == lines
    assert folder(photos, test_fraction=0, only=listing(tmp_path / "list.txt", *lines[:2])).unlabelled is None
    with pytest.raises(UserError, match="names 1 of the images with a label to learn from; name two or more"):
        folder(photos, test_fraction=0, only=listing(tmp_path / "list.txt", *lines[1:]))


def test_a_run_keeps_to_its_list(photos: Path, tmp_path: Path) -> None:
    one, other = (
        ["a/plain 0.png", "b/plain 0.png", "c/plain 0.png"],
        ["a/plain 1.png", "b/plain 0.png", "c/plain 0.png"],
    )
    then = folder(photos, only=listing(tmp_path / "list.txt", *one), test_fraction=0).manifest()
    Image.new("RGB", (16, 16)).save(photos / "a" / "new.png")
    again = folder(photos, only=listing(tmp_path / "list.txt", *reversed(one)), test_fraction=0)
    assert again.as_recorded(then).train.addresses(photos) == one
    for only in (listing(tmp_path / "list.txt", *other), None):
        with pytest.raises(UserError, match=r"\(dataset.only\) is another one than when the run began"):
            folder(photos, only=only, test_fraction=0).as_recorded(then)
