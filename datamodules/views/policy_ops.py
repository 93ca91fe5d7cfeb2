"""The operations of augmentation policies on whole batches, each image with an operation of its own.

Every operation is one of three kinds, and all three kinds act on every image with parameters that leave it alone where
another kind was drawn: a move of pixels (nearest neighbour), a table of 256 levels per channel, or a blend with a
reference image. No shape depends on a value. Levels are whole numbers 0 .. 255 rounded as Pillow rounds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selfsight.datamodules.views.policies import OPERATIONS

_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


def apply_policy(images: Tensor, operations: Tensor, values: Tensor) -> Tensor:
    """Operations one after the other.

    Args:
        images: ``[B, 3, H, W]`` floats in 0 .. 1.
        operations, values: ``[B, n]``, from `policies`: numbers into `OPERATIONS` and values in final units.

    Returns:
        ``[B, 3, H, W]``, multiples of 1 / 255.
    """
    levels = (images.float() * 255).round().clamp(0, 255)
    for step in range(operations.shape[1]):
        levels = operate(levels, operations[:, step], values[:, step].float())
    return (levels / 255).to(images.dtype)


def operate(levels: Tensor, operation: Tensor, value: Tensor) -> Tensor:
    """One operation per image on whole levels ``[B, 3, H, W]`` float32; ``operation`` and ``value`` are ``[B]``."""
    levels = _move(levels, operation, value)
    levels = _look_up(levels, operation, value)
    return _blend(levels, operation, value)


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == _NUMBER[name]


def _move(levels: Tensor, operation: Tensor, value: Tensor) -> Tensor:
    """Shears, translations and rotation: output pixel (x, y) comes from (a x + b y + c, d x + e y + f) of the input."""
    batch, channels, height, width = levels.shape
    zero, one = torch.zeros_like(value), torch.ones_like(value)
    angle = torch.where(_is(operation, "Rotate"), value * (-math.pi / 180), zero)
    cos, sin = torch.cos(angle), torch.sin(angle)
    b = torch.where(_is(operation, "ShearX"), value, sin)
    d = torch.where(_is(operation, "ShearY"), value, -sin)
    turned = _is(operation, "Rotate")
    c = torch.where(_is(operation, "TranslateX"), value, zero)
    f = torch.where(_is(operation, "TranslateY"), value, zero)
    c = torch.where(turned, (1 - cos) * (width / 2) - sin * (height / 2), c)
    f = torch.where(turned, (1 - cos) * (height / 2) + sin * (width / 2), f)
    a = e = torch.where(turned, cos, one)

    def fixed(number: Tensor) -> Tensor:  # Pillow steps through the image in units of 1 / 65536 pixel
        return torch.floor(number * 65536 + 0.5).long()[:, None, None]

    x = torch.arange(width, device=levels.device)[None, None]
    y = torch.arange(height, device=levels.device)[None, :, None]
    column = (fixed(c + (a + b) / 2) + fixed(a) * x + fixed(b) * y) >> 16
    row = (fixed(f + (d + e) / 2) + fixed(d) * x + fixed(e) * y) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(batch, 1, -1)
    moved = levels.reshape(batch, channels, -1).gather(2, place.expand(-1, channels, -1))
    return torch.where(inside[:, None], moved.view_as(levels), torch.zeros_like(levels))


def _look_up(levels: Tensor, operation: Tensor, value: Tensor) -> Tensor:
    """Operations that send every level to another one."""
    table = torch.arange(256, device=levels.device, dtype=levels.dtype).expand(len(levels), 3, 256)
    flat = levels.flatten(2)
    indices = flat.long()
    operation, value = operation[:, None, None], value[:, None, None]
    lowest, highest = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    mean = torch.floor(_luma(levels).mean((-2, -1)) + 0.5)[:, :, None]
    step = 2 ** (8 - value.clamp(1, 8))
    inverted = 255 - table
    added = (table + torch.trunc(value)).clamp(0, 255)
    candidates = {
        "AutoContrast": _stretched(table, lowest, highest),
        "Equalize": _equalized(table, indices, highest),
        "Invert": inverted,
        "Posterize": torch.floor(table / step) * step,
        "Solarize": torch.where(table < value, table, inverted),
        "SolarizeAdd": torch.where(added < 128, added, 255 - added),
        "LiftDark": torch.where(table < 128, added, table),
        "Brightness": (value * table).clamp(0, 255).floor(),
        "Contrast": (mean + value * (table - mean)).clamp(0, 255).floor(),
    }
    for name, candidate in candidates.items():
        table = torch.where(_is(operation, name), candidate, table)
    return table.gather(2, indices).view_as(levels)


def _stretched(table: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    # Pillow's own expression in double precision: its rounding decides levels that should come out whole
    wide = table.dtype if table.device.type == "mps" else torch.float64
    scale = 255 / (highest - lowest).clamp(min=1).to(wide)
    spread = torch.trunc(table.to(wide) * scale + -lowest.to(wide) * scale).clamp(0, 255)
    return torch.where(highest > lowest, spread.to(table.dtype), table)


def _equalized(table: Tensor, indices: Tensor, highest: Tensor) -> Tensor:
    counts = torch.zeros_like(table).scatter_add(2, indices, torch.ones_like(indices, dtype=table.dtype))
    step = torch.floor((counts.sum(-1, keepdim=True) - counts.gather(2, highest.long())) / 255)
    below = counts.cumsum(-1) - counts
    spread = torch.floor((torch.floor(step / 2) + below) / step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, spread, table)


def _blend(levels: Tensor, operation: Tensor, value: Tensor) -> Tensor:
    """Colour (with the grey image) and sharpness (with the smoothed one): ref + value (x - ref)."""
    operation, value = operation[:, None, None, None], value[:, None, None, None]
    colour, sharpness = _is(operation, "Color"), _is(operation, "Sharpness")
    ref = torch.where(colour, _luma(levels), torch.where(sharpness, _smoothed(levels), levels))
    blended = (ref + value * (levels - ref)).clamp(0, 255).floor()
    return torch.where(colour | sharpness, blended, levels)


def _luma(levels: Tensor) -> Tensor:
    """Pillow's grey levels ``[B, 1, H, W]``, in its whole-number arithmetic."""
    red, green, blue = levels.unbind(1)
    # below 2 ** 24, hence exact in float32
    return torch.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)[:, None]


def _smoothed(levels: Tensor) -> Tensor:
    """Pillow's SMOOTH: the mean over 3 x 3 pixels with five-fold weight in the middle; the border stays."""
    height, width = levels.shape[-2:]
    if height < 3 or width < 3:
        return levels
    total = 4 * levels[..., 1:-1, 1:-1]
    for dy in range(3):
        for dx in range(3):
            total = total + levels[..., dy : dy + height - 2, dx : dx + width - 2]
    middle = torch.floor(total / 13 + 0.5)
    top, bottom = levels[..., :1, 1:-1], levels[..., -1:, 1:-1]
    column = torch.cat([top, middle, bottom], -2)
    return torch.cat([levels[..., :1], column, levels[..., -1:]], -1)
