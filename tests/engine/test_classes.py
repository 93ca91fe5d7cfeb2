"""The sizes of the classes at the start of a run."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from selfsight.datamodules import ArrayImages, ImageData
from selfsight.engine.about_data import about_absent_classes, about_few_tests, show_classes


def labelled(counts: list[int], test: list[int] | None = None) -> ImageData:
    def images(counts: list[int]) -> ArrayImages:
        labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)] + [-1])
        return ArrayImages(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels)

    classes = tuple(f"class {chr(97 + i)}" for i in range(len(counts)))
    held = None if test is None else images(test)
    return ImageData("set", images(counts), held, classes, 2, (0.5,) * 3, (0.5,) * 3)


def told(counts: list[int], test: list[int] | None = None) -> str:
    data = labelled(counts, test)
    console = Console(record=True, width=200)
    show_classes(console, data)
    return console.export_text()


def test_even_classes_are_a_line() -> None:
    assert told([10, 12, 11]) == "classes of 10 to 12 images\n"


def test_uneven_classes_are_a_table_with_the_rarest_first() -> None:
    lines = told([40, 3, 20], [5, 2, 4]).splitlines()
    rows = [line.split() for line in lines if line.startswith("class ")]
    assert rows == [
        ["class", "train", "test"],
        ["class", "b", "3", "2"],
        ["class", "c", "20", "4"],
        ["class", "a", "40", "5"],
    ]
    assert "the rarest class, 'class b', has 3 of 63 labelled images" in lines[-1]


def test_classes_without_a_test_image_are_named() -> None:
    def told(test: list[int]) -> str:
        return about_absent_classes(labelled([9, 9, 9, 9, 9], test))

    assert told([1, 2, 1, 3, 1]) == ""
    assert told([0, 0, 0, 0, 0]) == ""  # none are labelled: there is no accuracy
    assert told([1, 2, 0, 3, 1]).startswith("no test image is of 'class c' (1 of 5 classes): accuracies are")
    assert "'class b', 'class c', 'class d' and 1 more (4 of 5 classes)" in told([1, 0, 0, 0, 0])


def test_many_classes_are_shortened() -> None:
    text = told(list(range(1, 25)))
    assert "… 14 more" in text
    assert sum(line.startswith("class ") for line in text.splitlines()) == 11


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        (4, "only 4 test images: one of them is 25 % of every accuracy"),
        (1, "only 1 test image: it decides every accuracy"),
        (0, ""),
        (50, ""),
    ],
)
def test_few_test_images_are_told(tests: int, told: str) -> None:
    some = ArrayImages(torch.zeros(max(1, tests), 3, 2, 2, dtype=torch.uint8))
    data = ImageData("x", some, some if tests else None, (), 2, (0.5,) * 3, (0.5,) * 3)
    said = about_few_tests(data)
    assert said.startswith(told)
    assert bool(said) == bool(told)
