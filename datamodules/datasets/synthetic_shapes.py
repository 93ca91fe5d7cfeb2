"""Drawn images with masks, for dense methods and their probes where nothing can be downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VOID = 255  # in masks: nothing is asked here
SHAPES = ("background", "disc", "square", "triangle", "ring")


def draw(
    size: int, rng: np.random.Generator, number: Sequence[int], grey: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image ``[size, size, 3]`` and mask: shapes, each class with stripes of its own, on a noisy ground.

    Colours are random, so that texture and form have to tell the classes apart. Void at the borders.

    Args:
        number: the fewest and the most shapes there may be; later ones hide earlier ones.
        grey: brightness alone is random, and all channels are equal.
    """

    def colour() -> NDArray[np.float64]:
        return np.full(3, rng.uniform(60, 190)) if grey else rng.uniform(60, 190, 3)

    y, x = np.mgrid[:size, :size].astype(np.float64)
    image = colour() + rng.normal(0, 18, (size, size, 1))
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(number[0], number[1] + 1)):
        kind = int(rng.integers(1, len(SHAPES)))
        radius = size * rng.uniform(0.15, 0.26)
        cx, cy = rng.uniform(radius, size - radius, 2)
        distance = _distance(SHAPES[kind], x - cx, y - cy, radius)  # below 0 inside, in pixels
        across = (x, y, x + y, x - y)[kind - 1]
        stripes = np.sin(across * 2 * np.pi / (4 + kind) + rng.uniform(0, 2 * np.pi))
        striped = colour() + 45 * stripes[..., None] + rng.normal(0, 8, (size, size, 1))
        inside = distance < 0
        image[inside] = striped[inside]
        mask[inside] = kind
        mask[np.abs(distance) < 0.75] = VOID
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _distance(kind: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """About the distance in pixels to the border of a shape around the origin, negative inside."""
    if kind == "disc":
        return np.hypot(x, y) - radius
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if kind == "triangle":
        return np.maximum(y - 0.6 * radius, np.abs(x) * 0.866 - y * 0.5 - 0.5 * radius)
    return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
