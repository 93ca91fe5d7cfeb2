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

    from selfsight.datamodules.images.bands import Bands


#: percentiles of a channel that become black and white
DARKEST, LIGHTEST = 2, 98


def visible(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` uint8 of an image of any channels and type.

    RGB of eight bits stays as it is. Of others the first three channels are red, green and blue, of one or two the
    first is grey, each stretched from its second percentile to its 98th.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    values = shown.astype(np.float32)
    low, high = np.percentile(values, (DARKEST, LIGHTEST), axis=(0, 1))
    stretched = (values - low) / np.where(high > low, high - low, 1)
    eight = np.rint(np.clip(stretched, 0, 1) * 255).astype(np.uint8)
    return np.repeat(eight, 3, axis=2) if eight.shape[2] == 1 else eight


def about_pictures(bands: Bands | None) -> str:
    """How pictures show images that are not RGB of eight bits; empty for those that are."""
    if bands is None:
        return ""
    count = bands.kind.channels
    what = "channels 1, 2 and 3 as red, green and blue" if count >= 3 else "channel 1 as grey" if count > 1 else "grey"
    return (
        f"The images have {bands.kind}. Pictures show {what}, each picture stretched from its {DARKEST}nd to its "
        f"{LIGHTEST}th percentile."
    )


def fitted(image: np.ndarray, side: int) -> Image.Image:
    """An image as a Pillow image, its longer side ``side`` pixels; small ones are enlarged unblurred."""
    from PIL import Image

    picture = Image.fromarray(visible(image))
    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    """A Pillow image as an address that holds the image itself."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: np.ndarray, side: int = 72) -> str:
    """An image as the address of a small picture, see `visible`. Images smaller than that stay as they are."""
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


def denormalised(x: Tensor, mean: Sequence[float], std: Sequence[float], colour: bool = True) -> np.ndarray:
    """Normalised ``[..., C, H, W]`` back to ``[..., H, W, C]``: uint8 of RGB, else the values as they were."""
    channels = x.new_tensor(list(mean)).view(-1, 1, 1), x.new_tensor(list(std)).view(-1, 1, 1)
    values = (x * channels[1] + channels[0]).movedim(-3, -1)
    if not colour:
        return values.float().cpu().numpy()
    return values.clamp(0, 1).mul(255).round().byte().cpu().numpy()
