"""Data sets with a name: one function each, which gives an `ImageData`."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from .images import ArrayImages, ImageData
from .splits import hold_out


def digits(
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    test_fraction: float,
    seed: int,
    name: str = "digits",
) -> ImageData:
    """The 1,797 handwritten digits of scikit-learn (8 x 8, 17 levels of grey), enlarged once to ``image_size``.

    ``test_fraction`` of every class is held out, chosen by ``seed``: 0.2 leaves 1,437 to learn from and 360 to test.
    """
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    levels = (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    side = (image_size, image_size)
    enlarged = np.stack([cv2.resize(image, side, interpolation=cv2.INTER_CUBIC) for image in levels])
    pixels = torch.from_numpy(enlarged)[:, None].repeat(1, 3, 1, 1)
    images = ArrayImages(pixels, torch.from_numpy(labels.astype(np.int64)))
    train, test = hold_out(images.labels, len(images), test_fraction, seed)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(name, images.select(train), images.select(test), classes, image_size, tuple(mean), tuple(std))
