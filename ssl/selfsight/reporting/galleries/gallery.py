"""What a gallery is, and the function that every method's file adds its pictures to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from selfsight.contracts import Batch
from selfsight.methods.base import Method


@dataclass(frozen=True)
class Gallery:
    """Rows of images in which a method shows what it does.

    Attributes:
        title: a heading.
        note: one sentence on what to see.
        images: ``[rows, columns, 3, H, W]``, normalised as the views are.
        captions: a word below each image, ``""`` for none; empty for no captions at all.
        right: ``[rows, columns]`` bool, images marked as mistaken where it is False; None where nothing can be.
        points: ``[rows, columns, n, 2]``, places (x, y) in the images as shares of their sides; the k-th points of a
            row belong together. None for none.
        labelled: ``[rows, m]``, positions of labelled images to show behind those of each row; captions go on over
            them. None for none.
    """

    title: str
    note: str
    images: Tensor
    captions: Sequence[Sequence[str]] = ()
    right: Tensor | None = None
    points: Tensor | None = None
    labelled: Tensor | None = None


@functools.singledispatch
def galleries(method: Method, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """Pictures of what a method does with some images, for the report; called in eval mode without gradient.

    None for a method that nobody has drawn yet: ``@galleries.register`` on a function of the same arguments, whose
    first is annotated with the method's class, adds some.

    Args:
        method: decides by its class, or the nearest class above it, which function draws.
        batch: the un-augmented images as view 0, then views as in training, all with their boxes.
        classes: names of the classes; empty without.
    """
    return []
