"""What a person is told of a data set: its size, its classes, and what their names are."""

from __future__ import annotations

import os

from rich.console import Console

from selfsight.datamodules import ImageData
from selfsight.runs.console import make_table

NO_LABEL = "no label"
#: test images below which one of them is too large a share of every figure
FEW_TESTS = 50
#: classes that a sentence names, at most
FEW_NAMES = 3
#: classes of which the table at the start of a run shows at most so many
SHOWN_CLASSES = 10
#: sizes of the largest and the smallest class that are about the same
EVEN = 1.5


def describe(data: ImageData) -> str:
    """``digits (1,437 images, 10 classes)``."""
    images = len(data.train) + (len(data.unlabelled) if data.unlabelled is not None else 0)
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    return f"{data.name} ({images:,} images{classes})"


def about_few_tests(data: ImageData) -> str:
    """What small figures of so few test images are; empty where they are many, or none."""
    number = len(data.test or ())
    if not 0 < number < FEW_TESTS:
        return ""
    each = f"one of them is {100 / number:.3g} % of every accuracy" if number > 1 else "it decides every accuracy"
    return f"only {number} test image{'s' * (number > 1)}: {each}, and differences below a few of them are chance"


def about_absent_classes(data: ImageData) -> str:
    """The classes that no test image is of, and how each gets one; empty where all are tested, or none can be."""
    test = data.class_counts("test")
    absent = [label for label, images in enumerate(data.class_counts("train")) if images and not test[label]]
    if not sum(test) or not absent:
        return ""
    named = ", ".join(f"'{class_name(data, label)}'" for label in absent[:FEW_NAMES])
    more = f" and {len(absent) - FEW_NAMES} more" if len(absent) > FEW_NAMES else ""
    return (
        f"no test image is of {named}{more} ({len(absent)} of {data.num_classes} classes): accuracies are of others; "
        "dataset.split=draw holds out of every class in proportion, dataset.test=DIR takes a folder of test images"
    )


def show_classes(console: Console, data: ImageData, evened: str = "") -> None:
    """How many images each class has: a line where all have about as many, else a table with the rarest first.

    Args:
        evened: the words by which the method at hand evens the classes out, where it can.
    """
    counts = data.class_counts("train")
    if not sum(counts):
        return
    order = sorted(range(len(counts)), key=lambda label: (counts[label], label))
    fewest, most = counts[order[0]], counts[order[-1]]
    if most <= EVEN * fewest:
        told = f"{most:,} image{'s' * (most > 1)}" if fewest == most else f"{fewest:,} to {most:,} images"
        console.print(f"classes of {told}", style="dim", markup=False)
        return
    test, half = data.class_counts("test"), SHOWN_CLASSES // 2
    rows = [[class_name(data, label), f"{counts[label]:,}", f"{test[label]:,}"] for label in order]
    if len(rows) > SHOWN_CLASSES:
        rows[half:-half] = [[f"… {len(rows) - 2 * half} more", "", ""]]
    console.print(make_table("class", "train", "test", rows=rows))
    console.print(
        f"the rarest class, '{class_name(data, order[0])}', has {fewest:,} of {sum(counts):,} labelled images, "
        f"the largest {most:,}: accuracy says little of the rare ones; "
        + (f"{evened} evens them out." if evened else "balanced accuracy stands beside it."),
        style="dim",
        markup=False,
    )


def class_name(data: ImageData, label: int) -> str:
    return readable(str(data.classes[label])) if 0 <= label < data.num_classes else NO_LABEL


def readable(name: str) -> str:
    """A name of a file or folder as text; bytes in it that are none, as some systems have them, are marked."""
    return os.fsencode(name).decode(errors="replace")
