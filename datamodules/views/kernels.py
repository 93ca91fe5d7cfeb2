"""Resampling and blur as matrices: one weight matrix a side and image, so that out = A image B^T."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resize_matrix(
    start: Tensor, length: Tensor, size: int, n: int, interpolation: str, *, bounded: bool = True
) -> Tensor:
    """Weights ``[B, size, n]`` that resample the interval ``start .. start + length`` of ``n`` pixels to ``size``.

    Args:
        start, length: ``[B]`` in pixels.
        size: pixels of the result.
        n: pixels of the source.
        interpolation: one of `views.INTERPOLATIONS`.
        bounded: taps stay inside the interval (a crop that is then resized); else inside the source.

    Each row sums to one. ``bilinear`` is max(0, 1 - |p - c| / s) with s = max(1, length / size), as Pillow's.
    """
    if interpolation.startswith("bicubic_simclr"):
        index, weight = cubic_taps(start, length, size, n, interpolation)
        return weight.new_zeros(len(start), size, n).scatter_add_(2, index.long(), weight)
    place = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    pixel = torch.arange(n, device=start.device, dtype=start.dtype) + 0.5
    step = (length / size)[:, None]
    centre = start[:, None] + place * step
    distance = (pixel - centre[..., None]) / step.clamp(min=1)[..., None]
    weight = _triangle(distance) if interpolation == "bilinear" else _cubic(distance, -0.5)
    if bounded:
        inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
        weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def cubic_taps(start: Tensor, length: Tensor, size: int, n: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """TensorFlow's cubic resampling without antialiasing: four taps a pixel, indices and weights ``[B, size, 4]``.

    ``bicubic_simclr``: half-pixel centres, a = -0.5, taps outside the crop are dropped and the others renormalised.
    ``bicubic_simclr_tf1``: aligned corners, a = -0.75, taps outside count for the border pixel.
    Both round the position between two pixels to 1/1024.
    """
    legacy = interpolation == "bicubic_simclr_tf1"
    place = torch.arange(size, device=start.device, dtype=start.dtype)
    step = (length / size)[:, None]
    centre = place * step if legacy else (place + 0.5) * step - 0.5
    below = centre.floor()
    fraction = ((centre - below) * 1024).round() / 1024
    offset = torch.arange(-1, 3, device=start.device, dtype=start.dtype)
    index = below[..., None] + offset
    weight = _cubic(offset - fraction[..., None], -0.75 if legacy else -0.5)
    last = (length - 1)[:, None, None]
    if not legacy:
        weight = weight * ((index >= 0) & (index <= last))
        weight = weight / weight.sum(-1, keepdim=True)
    index = torch.minimum(index.clamp(min=0), last) + start[:, None, None]
    return index.clamp(0, n - 1), weight


def selection_matrix(start: Tensor, size: int, n: int, padding_mode: str) -> Tensor:
    """Weights ``[B, size, n]`` that copy ``size`` pixels from ``start`` on; outside, zeros or the mirrored source."""
    place = start[:, None] + torch.arange(size, device=start.device, dtype=start.dtype)
    if padding_mode == "reflect":
        place = _mirrored(place, n)
    pixel = torch.arange(n, device=start.device, dtype=start.dtype)
    return (place[..., None] == pixel).to(start.dtype)


def blur_matrix(sigma: Tensor, n: int, kernel: str, radius: int) -> Tensor:
    """Weights ``[B, n, n]`` of a blur with standard deviation ``sigma`` ``[B]`` in pixels; the identity for sigma 0.

    ``gaussian`` and ``simclr`` cut the kernel at ``radius``; beyond the border ``gaussian`` mirrors the image and
    ``simclr`` sees zeros. ``pillow`` is three box filters in a row, each of which repeats the last pixel.
    """
    if kernel == "pillow":
        box = _folded(_box(_offsets(radius // 3, sigma), sigma), n, "replicate")
        return box @ box @ box
    taps = _gaussian(_offsets(radius, sigma), sigma)
    return _folded(taps, n, "reflect" if kernel == "gaussian" else "zeros")


def _offsets(radius: int, like: Tensor) -> Tensor:
    return torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)


def _folded(taps: Tensor, n: int, border: str) -> Tensor:
    """Kernels ``[B, taps]`` as matrices ``[B, n, n]``; those beyond a border go to the pixels repeated there."""
    pixel = torch.arange(n, device=taps.device, dtype=taps.dtype)
    place = pixel[:, None] + _offsets(taps.shape[1] // 2, taps)
    if border == "reflect":
        place = _mirrored(place, n)
    elif border == "replicate":
        place = place.clamp(0, n - 1)
    fold = (place[..., None] == pixel).to(taps.dtype)
    return torch.einsum("bt,itj->bij", taps, fold)


def _mirrored(place: Tensor, n: int) -> Tensor:
    """Positions outside 0 .. n - 1 as those that a mirror at the first or last pixel shows there."""
    period = max(2 * (n - 1), 1)
    place = torch.remainder(place, period)
    return torch.minimum(place, period - place) if n > 1 else place


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (1981)."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _gaussian(offset: Tensor, sigma: Tensor) -> Tensor:
    """``[B, taps]`` summing to one; a single one where sigma is 0."""
    spread = sigma.clamp(min=1e-3)[:, None]
    weight = torch.exp(-0.5 * (offset / spread) ** 2)
    return weight / weight.sum(-1, keepdim=True)


def _box(offset: Tensor, sigma: Tensor) -> Tensor:
    """``[B, taps]``: the box, with fractional ends, of a third of the variance (Gwosdek et al. 2011; Pillow)."""
    variance = sigma[:, None] ** 2 / 3
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = offset.abs()
    box = torch.where(reach <= whole, 1.0, torch.where(reach <= whole + 1, part, 0.0))
    return box / (2 * (whole + part) + 1)


def pillow_radius(sigma: float) -> int:
    """Farthest pixel that Pillow's blur of ``sigma`` reaches."""
    return 3 * (math.floor((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1)
