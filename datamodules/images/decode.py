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
#: GIF, TIFF, the PNM family, JPEG 2000
OTHER_STARTS = (
    b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", *(b"P%d" % n for n in range(1, 7)),
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)  # fmt: skip

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
    """Whether a file is a complete image, as far as can be told without decoding it.

    A JPEG or PNG is when it has an end, WebP and BMP files say how long they are, and of the other formats only the
    start is looked at.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
            size = file.seek(0, io.SEEK_END)
            if start.startswith((JPEG_START, PNG_START)):
                file.seek(max(0, size - 8))
                return file.read().endswith((JPEG_END, PNG_END)) or has_end(path.read_bytes())
    except OSError:
        return False
    length = _stated_length(start)
    return length is not None and length <= size


def has_end(data: bytes) -> bool:
    """Whether the JPEG or PNG at the start of the bytes is complete; others may follow it, as phones append."""
    if data.endswith((JPEG_END, PNG_END)):
        return True
    if data.startswith(PNG_START):
        return PNG_END in data
    return data.find(JPEG_END, _pixels_of_jpeg(data)) >= 0


def _pixels_of_jpeg(data: bytes) -> int:
    """Where the headers of a JPEG are over; a thumbnail among them has an end of its own."""
    at = len(JPEG_START)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at if data[at : at + 1] == b"\xff" else len(data)


def _stated_length(start: bytes) -> int | None:
    """How many bytes a file that begins so has at least; None where no image begins so."""
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little")
    if start.startswith(b"BM"):
        return int.from_bytes(start[2:6], "little")
    return 0 if start.startswith(OTHER_STARTS) else None


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
        if not has_end(data):
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
