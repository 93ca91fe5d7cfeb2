"""Small pictures for pages: thumbnails, frames, sheets of many, and images back out of normalised tensors."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def fitted(image: np.ndarray, side: int) -> Image.Image:
    """``[H, W, 3]`` uint8 as a Pillow image, its longer side ``side`` pixels; small ones are enlarged unblurred."""
    from PIL import Image

    picture = Image.fromarray(image)
    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    """A Pillow image as an address that holds the image itself."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: np.ndarray, side: int = 72) -> str:
    """``[H, W, 3]`` uint8 as the address of a small picture. Images smaller than that stay as they are."""
    small = max(image.shape[:2]) <= side
    return data_url(fitted(image, max(image.shape[:2]) if small else side), "PNG" if small else "WEBP")


def framed(image: np.ndarray, side: int, colour: str, width: int) -> Image.Image:
    """A picture with a frame of ``width`` in a colour such as ``#3366cc``, in a square of ``side`` pixels.

    Beside a picture that is no square nothing is drawn.
    """
    from PIL import Image

    inner = fitted(image, side - 2 * width)
    canvas = Image.new("RGBA", (side, side))
    x, y = (side - inner.width) // 2, (side - inner.height) // 2
    canvas.paste(colour, (x - width, y - width, x + inner.width + width, y + inner.height + width))
    canvas.paste(inner, (x, y))
    return canvas


def atlas(images: Sequence[np.ndarray], tile: int) -> tuple[str, int]:
    """All images on one sheet, row by row in squares of ``tile`` pixels: its address, and how many stand in a row."""
    from PIL import Image

    columns = max(1, math.ceil(math.sqrt(len(images))))
    sheet = Image.new("RGB", (columns * tile, math.ceil(len(images) / columns) * tile), "white")
    for i, image in enumerate(images):
        small = fitted(image, tile)
        x, y = i % columns * tile, i // columns * tile
        sheet.paste(small, (x + (tile - small.width) // 2, y + (tile - small.height) // 2))
    return data_url(sheet, "WEBP"), columns


def denormalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised ``[..., 3, H, W]`` back to ``[..., H, W, 3]`` uint8."""
    channels = x.new_tensor(list(mean)).view(3, 1, 1), x.new_tensor(list(std)).view(3, 1, 1)
    pixels = (x * channels[1] + channels[0]).clamp(0, 1).mul(255).round().movedim(-3, -1)
    return pixels.byte().cpu().numpy()
