"""What a user has set, where it arrives: one sentence with what was given and what was expected, or the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsight.datamodules import LabelledDataModule, digits, shapes
from selfsight.datamodules.datasets import checks
from selfsight.errors import UserError

from .test_folder import make
from .test_module import LOOK, in_memory
from .test_module import module as images
from .test_semi import VIEWS
from .test_semi import module as semi
from .writers import write_pictures


def test_what_fits_is_given_back() -> None:
    assert checks.channels("mean", np.array([0.1, 0.2, 0.3], np.float32)) == pytest.approx((0.1, 0.2, 0.3))
    assert checks.path("root", 2024) == Path("2024")
    assert checks.path("root", "~") == Path.home()


@pytest.mark.parametrize(("value", "told"), [(True, "true"), ("", "''"), (None, "null"), (2.5, "2.5")])
def test_what_is_no_path(value: Any, told: str) -> None:
    with pytest.raises(UserError) as said:
        checks.path("root", value)
    assert str(said.value) == f"root is {told}; a path was expected."


@pytest.mark.parametrize("values", [0.5, None, "abc", [0.5], ["a", "b", "c"], [0.5, 0.5, float("inf")], [True] * 3])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_three_colours(key: str, values: Any, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(UserError, match=rf"dataset.{key} is .*; a list of three numbers.*red, green and blue"):
        make(tmp_path, **{key: values})


DATA = {"image_size": 16, "test_fraction": 0.2, "seed": 0, **LOOK}
DRAWN = {"train": 2, "test": 0, "image_size": 8, "drawn_size": 8, "number": [1, 2], "seed": 0, **LOOK}


@pytest.mark.parametrize("size", [20.5, 0, -3, "16", None])
def test_sizes(size: Any, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    sentence = "dataset.image_size is .*; a whole number of at least 1 was expected"
    for given in (lambda: digits(**{**DATA, "image_size": size}), lambda: make(tmp_path, image_size=size)):
        with pytest.raises(UserError, match=sentence):
            given()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resident": "banana"}, "dataset.resident is 'banana'; true, false or auto"),
        ({"std": [0.2, 0.2, 0]}, "dataset.std is .*three numbers above 0"),
        ({"eval_resize": 20.5}, "dataset.eval_resize is 20.5; a whole number"),
        ({"max_unreadable": "some"}, "dataset.max_unreadable is 'some'; a share"),
        ({"test_fraction": "some"}, "dataset.test_fraction is 'some'; a share"),
        ({"test_fraction": 0.5, "seed": 1.5}, "dataset.seed is 1.5; a whole number"),
        ({"test": True}, "dataset.test is true; a path"),
        ({"unlabelled": []}, r"dataset.unlabelled is \[\]; a path"),
    ],
)
def test_folders(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, **changes)


def test_a_folder_whose_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["2024/1.png", "2024/2.png", "2024/7/1.png"])
    monkeypatch.chdir(tmp_path)
    assert len(make(2024, test=7).train) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": 1}, "dataset.train is 1"),
        ({"test": 2.5}, "dataset.test is 2.5"),
        ({"drawn_size": 0}, "dataset.drawn_size is 0"),
        ({"number": 3}, "dataset.number is 3; a list of the fewest and the most"),
        ({"number": [3, 1]}, r"dataset.number is \[3, 1\]"),
        ({"number": ["a", "b"]}, "dataset.number is"),
        ({"grey": "yes"}, "dataset.grey is 'yes'; true or false"),
    ],
)
def test_drawn_shapes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        shapes(**{**DRAWN, **changes})


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_limits(n: Any) -> None:
    with pytest.raises(UserError, match=f"limit_images is {n}; a whole number of at least 1"):
        in_memory().limited(n)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 2.5}, "batch_size is 2.5; a whole number of at least 1 was expected"),
        ({"batch_size": 0}, "batch_size is 0; a whole number"),
        ({"num_workers": -1}, "num_workers is -1; auto or a whole number of at least 0"),
        ({"num_workers": 1.5}, "num_workers is 1.5; auto or"),
        ({"num_workers": "banana"}, "num_workers is 'banana'; auto or"),
        ({"seed": -1}, "seed is -1; a whole number of at least 0"),
        ({"engine": 3}, "views.engine is 3; auto, cpu or device"),
    ],
)
def test_batches(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        images(in_memory(), **changes)


@pytest.mark.parametrize("key", ["steps_per_epoch", "batch_size", "mu"])
@pytest.mark.parametrize("value", [-1, 0, 1.5])
def test_few_labels(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is {value}; .*a whole number of at least 1 was expected"):
        semi(**{key: value})
    options = {"labels": {"per_class": 2}, "batch_size": 2, "steps_per_epoch": 1, "num_workers": 0, "engine": "cpu"}
    if key != "mu":
        with pytest.raises(UserError, match=f"{key} is {value}; .*a whole number of at least 1 was expected"):
            LabelledDataModule(in_memory(), [VIEWS["weak"]], seed=0, **{**options, key: value})
