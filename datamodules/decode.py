"""Image files to ``[H, W, 3]`` uint8 RGB, whatever they hold: grey, 16 bit, palette, alpha, CMYK, progressive."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

#: endings of names taken for images when a folder is searched
EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2"]
)

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

# Damaged files are reported by us, once and by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Unreadable(Exception):
    """A file that is no image, or a damaged one; the message is the reason in a few words."""


def read_image(path: Path) -> np.ndarray:
    """The image in a file, ``[H, W, 3]`` uint8 RGB; raises `Unreadable`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be opened") from error
    return decode(data)


def looks_whole(path: Path) -> bool:
    """Whether the file starts and ends as a complete JPEG or PNG does; of other files only decoding can tell."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(-8, 2)
            end = file.read(8)
    except OSError:
        return False
    return (start.startswith(JPEG_START) and end.endswith(JPEG_END)) or (start == PNG_START and end == PNG_END)


def decode(data: bytes) -> np.ndarray:
    """Encoded image to ``[H, W, 3]`` uint8 RGB.

    The orientation stored in the file is applied, transparency is dropped, 16-bit values keep their upper 8 bits.
    OpenCV decodes (simplejpeg where it is installed), Pillow what OpenCV does not know.

    Raises:
        Unreadable: no image, an incomplete one, or pixels of more than 16 bits.
    """
    if not data:
        raise Unreadable("empty file")
    if data.startswith(JPEG_START):
        # Some decoders fill the missing part of a cut JPEG with grey and say nothing; Pillow tells it from a whole one.
        if not data.endswith(JPEG_END):
            return _pillow(data)
        fast = _simplejpeg()
        if fast is not None and b"Exif" not in data[:65536]:  # it knows nothing of orientation
            try:
                return np.asarray(fast(data, colorspace="RGB"))
            except ValueError:
                pass
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # more pixels than it takes
        image = None
    return _pillow(data) if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _pillow(data: bytes) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("I", "F"):
                raise Unreadable("pixels of 32 bits; 8 or 16 are expected")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable("too many pixels") from error
    except Exception as error:  # Pillow raises whatever its format readers stumble over
        truncated = "truncated" in str(error) or data.startswith(JPEG_START)
        raise Unreadable("incomplete image" if truncated else "no image") from error


@functools.cache
def _simplejpeg() -> Callable[..., Any] | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    decoder: Callable[..., Any] = decode_jpeg
    return decoder
