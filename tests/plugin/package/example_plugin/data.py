"""Drawn stripes in two directions: a data set of one's own is a function that gives an `ImageData`."""

from collections.abc import Sequence

import torch

from selfsight.datamodules import ArrayImages, ImageData


def stripes(
    *,
    images: int = 64,
    image_size: int = 16,
    mean: Sequence[float] = (0.4, 0.4, 0.4),
    std: Sequence[float] = (0.3, 0.3, 0.3),
    name: str = "stripes",
) -> ImageData:
    """Half of the images to learn from, half to test. Views refer to ``image_size``, ``mean`` and ``std``."""
    generator = torch.Generator().manual_seed(0)
    phase, labels = torch.randint(0, 4, (images, 1, 1), generator=generator), torch.arange(images) // 2 % 2
    lines = ((torch.arange(image_size) + phase) // 2 % 2).expand(-1, image_size, -1)  # [N, S, S], upright
    lines = torch.where(labels[:, None, None] == 1, lines.mT, lines)
    noise = torch.randint(0, 60, (images, 3, image_size, image_size), generator=generator)
    pixels = (150 * lines[:, None] + noise).to(torch.uint8)
    train, test = (ArrayImages(pixels[half::2], labels[half::2]) for half in (0, 1))
    return ImageData(name, train, test, ("upright", "level"), image_size, mean, std)
