"""Operations on one uint8 image ``[H, W, 3]``, in OpenCV and, where exactness asks for it, Pillow.

Values are rounded and clipped to 8 bits after each operation, as Pillow does. The tests compare each with Pillow and
torchvision; the agreement reached stands beside the operation, as mean and 99th percentile in grey levels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cv2
import numpy as np
import scipy.sparse
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from selfsight.datamodules.views import kernels
from selfsight.datamodules.views.policies import OPERATIONS

cv2.setNumThreads(0)  # workers are the parallelism; OpenCV's own threads would fight over the cores

Pixels = np.ndarray
_LEVELS = np.arange(256, dtype=np.float32)
_IDENTITY = np.eye(3, dtype=np.float32)
_TO_GREY = np.array([[0.299, 0.587, 0.114]] * 3, dtype=np.float32)
_BORDERS = {"gaussian": cv2.BORDER_REFLECT_101, "simclr": cv2.BORDER_CONSTANT}


def resize(image: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """The image at ``size`` (height, width).

    ``bilinear`` and ``bicubic`` are antialiased (torch's uint8 kernels, 0.02 / 1 from Pillow). An enlarging bilinear
    resize needs no antialiasing and goes to OpenCV (0.2 / 1). ``bicubic_simclr`` equals torch's ``bicubic`` where
    both sides are enlarged; otherwise, and for ``bicubic_simclr_tf1``, sparse matrices apply its four taps.
    """
    if image.shape[:2] == size:
        return image
    enlarging = image.shape[0] <= size[0] and image.shape[1] <= size[1]
    if interpolation == "bilinear" and enlarging:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    if interpolation == "bicubic_simclr_tf1" or (interpolation == "bicubic_simclr" and not enlarging):
        return _resize_by_taps(image, size, interpolation)
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # channels last: no copy
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    out = torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
    return out.permute(0, 2, 3, 1)[0].contiguous().numpy()


def _resize_by_taps(image: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Matrices of four weights a row."""
    height, width = image.shape[:2]
    return _resample(image, _weights(height, size[0], interpolation), _weights(width, size[1], interpolation))


def _resample(image: Pixels, rows: Any, columns: Any) -> Pixels:
    """One side after the other, as products with sparse matrices ``[h, H]`` and ``[w, W]``."""
    height, width = image.shape[:2]
    flat = image.astype(np.float32).reshape(height, -1)
    tall = (rows @ flat).reshape(-1, width, 3)
    turned = cv2.transpose(tall).reshape(width, -1)
    wide = (columns @ turned).reshape(-1, len(tall), 3)
    return cv2.transpose(np.clip(wide + 0.5, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=4096)
def _weights(length: int, size: int, interpolation: str) -> Any:
    start = torch.zeros(1)
    matrix = kernels.resize_matrix(start, start + length, size, length, interpolation)
    return scipy.sparse.csr_matrix(matrix[0].numpy())


#: an enlarged image whose longer side is more than so many squares cut from it is not made as a whole
ELONGATED = 4


def mostly_cut_away(image: tuple[int, int], scaled: tuple[int, int], size: int) -> bool:
    """Whether an image of (height, width), enlarged to ``scaled``, is much more than a square of ``size`` of it.

    A line of 1 x 8,000 pixels, resized to 224 x 1,792,000, would take 4 GB.
    """
    return scaled[0] > image[0] and max(scaled) > ELONGATED * size


def square_of_resized(
    image: Pixels, scaled: tuple[int, int], corner: tuple[int, int], size: int, interpolation: str
) -> Pixels:
    """``size x size`` pixels, from ``corner`` (top, left) on, of the image at ``scaled`` (height, width).

    Only the pixels are touched that the square is made of (1 / 1 from the square of the whole). ``bilinear`` or
    ``bicubic``.
    """
    bands = [
        _band(length, whole, first, size, interpolation)
        for length, whole, first in zip(image.shape, scaled, corner, strict=False)
    ]
    (top, rows), (left, columns) = bands
    return _resample(image[top : top + rows.shape[1], left : left + columns.shape[1]], rows, columns)


def _band(length: int, whole: int, first: int, size: int, interpolation: str) -> tuple[int, Any]:
    """First of the pixels of a side that ``size`` pixels need, from ``first`` on of ``whole``, and their weights."""
    step = length / whole
    reach = math.ceil(2 * max(step, 1)) + 1  # of a cubic
    start = max(0, math.floor(first * step) - reach)
    stop = min(length, math.ceil((first + size) * step) + reach)
    place, span = torch.tensor([first * step - start]), torch.tensor([size * step])
    matrix = kernels.resize_matrix(place, span, size, stop - start, interpolation, bounded=False)
    return start, scipy.sparse.csr_matrix(matrix[0].numpy())


def crop(
    image: Pixels,
    box: tuple[float, float, float, float],
    size: int,
    *,
    interpolation: str = "bilinear",
    hflip: bool | None = None,
    vflip: bool | None = None,
    padding_mode: str = "zeros",
) -> Pixels:
    """The ``box`` (top, left, height, width in whole pixels) of the image at ``size x size``, flipped if asked.

    A box that reaches beyond the image sees zeros there, or the image mirrored (``padding_mode='reflect'``).
    """
    top, left, height, width = int(box[0]), int(box[1]), int(box[2]), int(box[3])
    bottom, right = top + height, left + width
    if top < 0 or left < 0 or bottom > image.shape[0] or right > image.shape[1]:
        pad = max(-top, 0), max(bottom - image.shape[0], 0), max(-left, 0), max(right - image.shape[1], 0)
        border = cv2.BORDER_REFLECT_101 if padding_mode == "reflect" else cv2.BORDER_CONSTANT
        image = cv2.copyMakeBorder(image, *pad, border)
        top, bottom, left, right = top + pad[0], bottom + pad[0], left + pad[2], right + pad[2]
    return flip(resize(image[top:bottom, left:right], (size, size), interpolation), hflip, vflip)


def flip(image: Pixels, hflip: bool | None, vflip: bool | None) -> Pixels:
    """The image mirrored left to right, top to bottom, or both."""
    if not (hflip or vflip):
        return image
    return cv2.flip(image, -1 if hflip and vflip else int(bool(hflip)))


def center(image: Pixels, size: int, crop_fraction: float, interpolation: str) -> Pixels:
    """Torchvision's Resize(round(size / crop_fraction)), CenterCrop(size)."""
    height, width = image.shape[:2]
    shorter = max(round(size / crop_fraction), size)
    tall = shorter if height <= width else int(shorter * height / width)
    wide = int(shorter * width / height) if height <= width else shorter
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    if mostly_cut_away((height, width), (tall, wide), size) and interpolation in ("bilinear", "bicubic"):
        return square_of_resized(image, (tall, wide), (top, left), size, interpolation)
    return resize(image, (tall, wide), interpolation)[top : top + size, left : left + size]


def brightness(image: Pixels, factor: float) -> Pixels:
    """Pillow's: values times ``factor``, cut to whole levels (exact)."""
    return cv2.LUT(image, np.minimum(_LEVELS * np.float32(factor), 255).astype(np.uint8))


def brightness_added(image: Pixels, amount: float) -> Pixels:
    """SimCLR version 1's: ``amount`` (of 1) added to the values."""
    return cv2.LUT(image, np.clip(_LEVELS + np.float32(255 * amount + 0.5), 0, 255).astype(np.uint8))


def contrast(image: Pixels, factor: float) -> Pixels:
    """Pillow's: distances from the mean of the grey image times ``factor`` (exact but for a mean on the edge)."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    table = _LEVELS - mean
    table *= factor
    table += mean
    return cv2.LUT(image, np.minimum(np.maximum(table, 0, out=table), 255, out=table).astype(np.uint8))


def contrast_per_channel(image: Pixels, factor: float) -> Pixels:
    """SimCLR's: distances from each channel's own mean times ``factor``."""
    means = np.array(cv2.mean(image)[:3])
    return cv2.transform(image, np.column_stack([np.diag([factor] * 3), (1 - factor) * means]))


def saturation(image: Pixels, factor: float) -> Pixels:
    """Pillow's: distances from the grey image times ``factor`` (0.4 / 1)."""
    return cv2.transform(image, factor * _IDENTITY + (1 - factor) * _TO_GREY)


def saturation_hsv(image: Pixels, factor: float) -> Pixels:
    """SimCLR's: the saturation of HSV times ``factor``."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    return cv2.cvtColor(cv2.transform(hsv, np.diag([1.0, factor, 1.0])), cv2.COLOR_HSV2RGB_FULL)


def hue(image: Pixels, shift: float) -> Pixels:
    """The hue of HSV turned by ``shift`` of a full turn, cut to 1 / 255 of a turn as in torchvision (0.2 / 2)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(255 * shift) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: Pixels) -> Pixels:
    """Three equal channels (weights 0.299, 0.587, 0.114)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: Pixels, sigma: float, kernel: str, radius: int) -> Pixels:
    """Gaussian blur of standard deviation ``sigma`` in pixels over ``2 radius + 1`` taps; ``pillow`` is Pillow's own.

    Pillow's differs from a true Gaussian by 0.5 / 2, and is five times as slow.
    """
    if kernel == "pillow":
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    reach = min(radius, math.ceil(4 * sigma))
    taps = cv2.getGaussianKernel(2 * reach + 1, sigma)
    return cv2.sepFilter2D(image, -1, taps, taps, borderType=_BORDERS[kernel])


def solarize(image: Pixels, threshold: float = 128) -> Pixels:
    """Values from ``threshold`` on inverted (exact)."""
    return cv2.LUT(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def cutout(image: Pixels, square: tuple[float, float, float, float], fill: tuple[int, int, int]) -> Pixels:
    """Rows and columns of ``square`` (first row, last row, first column, last column) filled, in a copy."""
    top, bottom, left, right = (int(value) for value in square)
    image = image.copy()
    image[top : bottom + 1, left : right + 1] = fill
    return image


def operate(image: Pixels, operation: int, value: float) -> Pixels:
    """One operation of a policy (a number into `policies.OPERATIONS`), by Pillow itself."""
    picture = Image.fromarray(image)
    return np.asarray(_operate(picture, OPERATIONS[operation], value))


def _operate(image: Image.Image, name: str, value: float) -> Image.Image:
    if name in _ENHANCE:
        return _ENHANCE[name](image).enhance(value)
    if name in _AFFINE:
        kept = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        kept[_AFFINE[name]] = value
        return image.transform(image.size, Image.Transform.AFFINE, tuple(kept))
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Posterize":
            return ImageOps.posterize(image, max(int(value), 1))
        case "Solarize":
            return ImageOps.solarize(image, math.ceil(value))
        case "SolarizeAdd":
            added = np.clip(np.asarray(image).astype(np.int64) + int(value), 0, 255).astype(np.uint8)
            return ImageOps.solarize(Image.fromarray(added), 128)
        case "LiftDark":
            return image.point(lambda level: min(level + int(value), 255) if level < 128 else level)
        case "Rotate":
            return image.rotate(value)
    return image


_ENHANCE = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}
_AFFINE = {"ShearX": 1, "ShearY": 3, "TranslateX": 2, "TranslateY": 5}
