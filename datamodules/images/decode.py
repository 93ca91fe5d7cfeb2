"""Image files to ``[H, W, 3]`` uint8 RGB, each by the definition of its format.

OpenCV decodes JPEG, PNG and WebP (simplejpeg the first of them, where it is installed), Pillow the others, and of TIFF
files what Pillow does not read tifffile, where it is installed. What becomes of what eight bits of red, green and blue
do not hold:

========================  ==========================================================================================
the file has              the image has
========================  ==========================================================================================
an orientation            it applied
transparency              the colours behind it: alpha is dropped, and taken out of colours that are multiplied by it
a palette                 its colours
grey                      three equal channels; white-is-zero TIFF files are turned round
9 to 16 bits              the upper eight of them, or that share of the range that the file states (``maxval``)
signed whole numbers      the range of their type from black to white, as TIFF defines it
numbers with a fraction   0 to 1 from black to white; values beyond are refused: nothing says what they mean
several pictures          the one that stands for the file: the default image of an animated PNG, else the first
CMYK, YCbCr, CIELAB       the colours converted, CMYK without a profile
a colour profile, gamma   nothing of it: values are taken for sRGB, as torchvision and timm do
further channels          the first three
DICOM                     the upper eight bits of its stored values, white large (see `dicom`)
========================  ==========================================================================================
"""

from __future__ import annotations

import functools
import io
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from selfsight.datamodules.images import dicom, formats
from selfsight.datamodules.images.formats import EXTENSIONS, Unreadable, check_size, looks_whole, read_file

__all__ = ["EXTENSIONS", "MAX_PIXELS", "Unreadable", "decode", "looks_whole", "read_image"]

#: pixels of the largest image that is decoded unless another limit is set: what the largest phone cameras take. A file
#: of a few bytes may claim any number.
MAX_PIXELS = 200_000_000
#: bytes a pixel of the largest file that is read, beyond headers
MOST_BYTES = 8
HEADERS = 2**26

#: what Pillow is asked to read. Not PostScript, which runs programs, and nothing that is no image of pixels.
PILLOW_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

#: tags of TIFF files, and what they may say
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339
BLACK_ON_WHITE, WHITE_ON_BLACK, RGB = 0, 1, 2
SIGNED, FLOAT = 2, 3
ASSOCIATED_ALPHA = 1  # colours multiplied by it

# Damaged files are reported by us, once and by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
for _name in ("tifffile", "pydicom"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in a file, ``[H, W, 3]`` uint8 RGB; raises `Unreadable`."""
    return decode(read_file(path, most_bytes(max_pixels)), max_pixels)


def most_bytes(max_pixels: int) -> int:
    """Of a file, or of the values in it, of an image of so many pixels."""
    return MOST_BYTES * max_pixels + HEADERS


@formats.refusing
def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded image to ``[H, W, 3]`` uint8 RGB; see above.

    Raises:
        Unreadable: no image, an incomplete one, one of more than ``max_pixels``, or one that nothing here reads.
    """
    if not data:
        raise Unreadable("empty file")
    kind = formats.kind(data[: formats.START])
    if kind not in ("jpeg", "png", "webp"):
        return _others(data, kind, max_pixels)
    check_size(formats.size(data, kind), max_pixels)
    if kind == "jpeg":
        # Some decoders fill the missing part of a cut JPEG with grey and say nothing; Pillow tells it from a whole one.
        if not formats.has_end(data):
            return _pillow(data, max_pixels)
        fast = _simplejpeg()
        if fast is not None and b"Exif" not in data[:65536]:  # it knows nothing of orientation
            try:
                return np.asarray(fast(data, colorspace="RGB"))
            except ValueError:
                pass
    elif formats.is_animation(data, kind):
        return _pillow(data, max_pixels)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # more pixels than it takes
        image = None
    return _pillow(data, max_pixels) if image is None else image


def _others(data: bytes, kind: str | None, max_pixels: int) -> np.ndarray:
    if kind is None:
        raise Unreadable("no image")
    if lacking := formats.lacking_decoder(kind):
        raise Unreadable(f"{kind.upper()} has no decoder here: {lacking}")
    if kind in ("npy", "npz"):
        raise Unreadable("an array, which is read with dataset.channels=auto")
    if kind == "dicom":
        values, bits, signed = dicom.read_stored(data, max_pixels)
        eight = to_eight_bits(values, bits, signed)
        return eight if eight.shape[2] == 3 else np.repeat(eight, 3, axis=2)
    if kind == "pnm" and (image := _binary_pnm(data, max_pixels)) is not None:
        return image
    return _pillow(data, max_pixels)


# --- Pillow ----------------------------------------------------------------------------------------------------------


def _pillow(data: bytes, max_pixels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with _opened(data) as image:
            check_size(image.size, max_pixels)
            tags = getattr(image, "tag_v2", {})
            return np.array(_eight_bits(ImageOps.exif_transpose(image), tags))
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:  # of a part
        raise Unreadable("too many pixels") from error
    except Exception as error:  # Pillow raises whatever its format readers stumble over
        if data.startswith(formats.TIFF_STARTS) and not _is_cut(error):
            return _tifffile(data, max_pixels)
        cut = _is_cut(error) or data.startswith(formats.JPEG_START)
        raise Unreadable("incomplete image" if cut else "no image") from error


def _is_cut(error: Exception) -> bool:
    return "truncated" in str(error)


_one_at_a_time = threading.Lock()


def _opened(data: bytes) -> Any:
    """A picture of which only the header has been read. Pillow's own limit for it is set aside: ours comes next."""
    from PIL import Image

    _register_heif()
    with _one_at_a_time:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=[name for name in PILLOW_FORMATS if name in _known_to_pillow()])
        finally:
            Image.MAX_IMAGE_PIXELS = usual


@functools.cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


@functools.cache
def _known_to_pillow() -> frozenset[str]:
    from PIL import Image

    Image.init()
    return frozenset(Image.OPEN)


def _eight_bits(image: Any, tags: Mapping[int, Any]) -> Any:
    """A picture of Pillow's as RGB of eight bits; ``tags`` are those of a TIFF file."""
    signed = _first(tags.get(SAMPLE_FORMAT, 1)) == SIGNED
    grey = np.asarray(image) if image.mode == "L" or image.mode.startswith(("I", "F")) else None
    if grey is not None and (image.mode != "L" or signed):
        bits = int(_first(tags.get(BITS, 8 * grey.dtype.itemsize)))
        if image.mode == "I" and not tags:  # grey values of 16 bits
            bits = 16
        if image.mode == "L":
            grey = grey.view(np.int8)
        elif image.mode == "I" and bits == 32 and not signed:
            grey = grey.view(np.uint32)
        grey = to_eight_bits(grey, bits, signed)
        grey = 255 - grey if tags.get(PHOTOMETRIC) == BLACK_ON_WHITE else grey
        return np.repeat(grey[..., None], 3, axis=2)
    if signed:
        raise Unreadable("signed values of several channels")
    if image.mode == "LAB":
        return _lab_to_srgb(image)
    if image.mode == "La":  # grey multiplied by alpha
        image = image.convert("LA")
    return image.convert("RGB")


def to_eight_bits(samples: np.ndarray, bits: int, signed: bool = False) -> np.ndarray:
    """Values of any type as uint8, by the range that they are defined on: whole numbers of ``bits``, or 0 to 1.

    Raises:
        Unreadable: fractions beyond 0 to 1, or whole numbers so small in their range that nothing is left of them.
    """
    if samples.dtype.kind == "f":
        low, high = float(samples.min()), float(samples.max())
        if not 0 <= low <= high <= 1:  # nor may any be no number
            raise Unreadable(f"pixels of {bits} bits from {low:g} to {high:g}, where 0 to 1 was expected")
        return np.rint(samples * 255).astype(np.uint8)
    values = samples.astype(np.int64) + (2 ** (bits - 1) if signed else 0)
    eight = values >> (bits - 8) if bits >= 16 else (values * 255 + 2 ** (bits - 1)) // (2**bits - 1)
    if bits > 8 and eight.min() == eight.max() and values.min() < values.max():
        raise Unreadable(f"pixels of {bits} bits that use less than a 256th of their range")
    return np.clip(eight, 0, 255).astype(np.uint8)


def _lab_to_srgb(image: Any) -> Any:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    exactly = ImageCms.Flags.NOOPTIMIZE  # a table in its place is wrong by six levels near the limits of sRGB
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB", flags=exactly)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) else value


# --- formats of which we know more than Pillow -----------------------------------------------------------------------

_PNM_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})" + rb"(?:#[^\n\r]*[\n\r])*\s")


def _binary_pnm(data: bytes, max_pixels: int) -> np.ndarray | None:
    """A PGM or PPM of binary values; None for the other kinds. (Pillow takes a second for each scaled megapixel.)"""
    if (header := _PNM_HEADER.match(data)) is None:
        return None
    width, height, largest = (int(header[i]) for i in (2, 3, 4))
    check_size((width, height), max_pixels)
    if not width or not height or not 0 < largest < 65536:
        raise Unreadable("no image")
    channels = 3 if header[1] == b"6" else 1
    kind = np.dtype(np.uint8 if largest < 256 else ">u2")
    count = width * height * channels
    if len(data) - header.end() < count * kind.itemsize:
        raise Unreadable("incomplete image")
    values: np.ndarray = np.frombuffer(data, kind, count, header.end()).reshape(height, width, channels)
    if largest == 65535:
        eight = (values >> 8).astype(np.uint8)
    elif largest == 255:
        eight = np.array(values, np.uint8)
    else:
        scaled = (values.astype(np.uint32) * 255 + largest // 2) // largest
        eight = np.minimum(scaled, 255).astype(np.uint8)
    return eight if channels == 3 else np.repeat(eight, 3, axis=2)


def _tifffile(data: bytes, max_pixels: int) -> np.ndarray:
    """A TIFF file of a kind that Pillow does not know: samples of other types, in other numbers."""
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF file of a rare kind; pip install 'selfsight[tiff]' reads more of them") from None
    from PIL import Image, ImageOps

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            width, height = int(page.imagewidth), int(page.imagelength)
            check_size((width, height), max_pixels)
            extra = [int(each) for each in page.extrasamples]
            colours = int(page.samplesperpixel) - len(extra)
            if int(page.photometric) not in (BLACK_ON_WHITE, WHITE_ON_BLACK, RGB) or colours not in (1, 3):
                raise Unreadable("a TIFF file of channels that are neither grey nor red, green and blue")
            bits, signed = int(_first(page.bitspersample)), int(page.sampleformat) == SIGNED
            apart = int(page.planarconfig) == 2
            samples = page.asarray()
            turn = page.tags.valueof(ORIENTATION) or 1
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable("a damaged TIFF file, or one of a rare kind") from error
    samples = np.moveaxis(samples.reshape(-1, height, width), 0, -1) if apart else samples.reshape(height, width, -1)
    if extra[:1] == [ASSOCIATED_ALPHA]:
        samples = _divided_by_alpha(samples, colours, 1.0 if samples.dtype.kind == "f" else 2**bits - 1)
    eight = to_eight_bits(samples[..., :colours], bits, signed)
    eight = 255 - eight if int(page.photometric) == BLACK_ON_WHITE else eight
    picture = Image.fromarray(eight if colours == 3 else np.repeat(eight, 3, axis=2))
    picture.getexif()[ORIENTATION] = turn
    return np.array(ImageOps.exif_transpose(picture))


def _divided_by_alpha(samples: np.ndarray, colours: int, full: float) -> np.ndarray:
    """Colours as they are behind an alpha from 0 to ``full`` that they were multiplied by; black where it is 0."""
    alpha = samples[..., colours : colours + 1].astype(np.float64)
    divided = samples[..., :colours] * (full / np.where(alpha > 0, alpha, np.inf))
    return np.minimum(divided, full).astype(samples.dtype)


@functools.cache
def _simplejpeg() -> Callable[..., Any] | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    decoder: Callable[..., Any] = decode_jpeg
    return decoder
