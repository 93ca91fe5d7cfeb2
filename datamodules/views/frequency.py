"""Smaller images that keep what large ones show coarsely: the low-frequency crop of EfficientTrain."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsight.errors import UserError


@torch.no_grad()
def low_frequencies(images: Tensor, band: int) -> Tensor:
    """The middle ``2b x 2b`` of the Fourier spectrum, ``b = band // 2``, as an image of that size.

    An ideal low-pass filter and sampling in one; the mean brightness stays. An odd band loses one. Nothing flows back.

    Args:
        images: ``[B, C, S, S]``.

    Returns:
        ``[B, C, 2b, 2b]``.

    Raises:
        UserError: images that are not square, or a band wider than they are.
    """
    side, b = images.shape[-1], band // 2
    if images.shape[-2] != side or not 1 <= b <= (side + 1) // 2:
        raise UserError(
            f"A low-frequency crop of {band} pixels was asked for of images of {images.shape[-2]} x {side}; it needs "
            f"square images and a band from 2 to {side}."
        )
    if 2 * b == side:
        return images
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    middle = side // 2
    kept = spectrum[..., middle - b : middle + b, middle - b : middle + b]
    small = torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(-2, -1))).real
    return small * (2 * b / side) ** 2


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """Pillow's Lanczos resize of a uint8 image ``[H, W, 3]`` to ``size``, in EfficientTrain++ the cheaper way."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
