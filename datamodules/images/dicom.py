"""DICOM images: their values as the standard defines them. Read by pydicom (extra ``dicom``).

What becomes of what a file says (DICOM PS3.3, C.7.6.3.1.2 and C.11): RGB, YBR and palettes are red, green and blue;
MONOCHROME1, in which small values are white, is turned round, so that white is large everywhere; a rescale slope and
intercept are applied, which makes 32-bit floats in the units of the modality (Hounsfield units of CT). Without them
grey values are as they are stored. A window maps a range of these units to 0 to 1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from selfsight.datamodules.images.formats import Unreadable, check_size, refusing
from selfsight.validation import Kind, above

#: centre and width in the units of the values; ``auto``: those that the file states; None: values as they are
Window = tuple[float, float] | str | None
WINDOW = Kind(
    "null, auto, or a list of the centre and the width",
    lambda v: (
        v is None
        or v == "auto"
        or (isinstance(v, Sequence) and not isinstance(v, str) and len(v) == 2 and above(0).fits(v[1]))
    ),
)
GREY = ("MONOCHROME1", "MONOCHROME2")


def read(data: bytes, max_pixels: int, window: Window = None) -> np.ndarray:
    """The image in a file, ``[H, W, C]`` in its own type; see above.

    Raises:
        Unreadable: no pixel data, several frames, a compression that nothing here reads, or damage.
    """
    about, pixels = _pixels(data, max_pixels)
    if not _is_grey(about):
        return pixels
    values, (low, high) = pixels, _limits(about)
    if (scale := _rescale(about)) is not None:
        slope, intercept = scale
        values = (pixels * np.float64(slope) + intercept).astype(np.float32)
        low, high = low * slope + intercept, high * slope + intercept
    inverted = about.PhotometricInterpretation == "MONOCHROME1"
    if window is not None:
        shown = _windowed(values.astype(np.float64), *_window(about, window))
        return (1 - shown if inverted else shown).astype(np.float32)
    if not inverted:
        return values
    return (low + high - values.astype(np.float64)).astype(values.dtype)


def read_stored(data: bytes, max_pixels: int) -> tuple[np.ndarray, int, bool]:
    """The stored values ``[H, W, C]``, without rescaling and window, their bits, and whether one of these is a sign.

    Raises:
        Unreadable: see `read`.
    """
    about, pixels = _pixels(data, max_pixels)
    if _is_grey(about) and about.PhotometricInterpretation == "MONOCHROME1":
        pixels = (sum(_limits(about)) - pixels.astype(np.int64)).astype(pixels.dtype)
    return pixels, int(about.BitsStored), bool(about.PixelRepresentation)


@refusing
def kind(file: IO[bytes], window: Window = None) -> tuple[int, str] | None:
    """Channels and type of what `read` gives, by the header; None for a colour or grey image of eight bits.

    Raises:
        Unreadable: the header is damaged, or tells of no pixels.
    """
    about = _header(file)
    try:
        if not _is_grey(about):
            return None if int(about.BitsAllocated) == 8 else (3, f"uint{int(about.BitsAllocated)}")
        if window is not None or _rescale(about) is not None:
            return 1, "float32"
        if int(about.BitsAllocated) == 8 and not about.PixelRepresentation:
            return None
        return 1, f"{'int' if about.PixelRepresentation else 'uint'}{int(about.BitsAllocated)}"
    except (AttributeError, TypeError, ValueError) as error:
        raise Unreadable("a DICOM file without pixel data") from error


def _header(file: IO[bytes]) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:  # pydicom raises whatever its parsers stumble over
        raise Unreadable("a damaged DICOM file") from error


def _pixels(data: bytes, max_pixels: int) -> tuple[Any, np.ndarray]:
    """What a file says of itself, and its stored values ``[H, W, C]``; colours are red, green and blue."""
    import pydicom
    from pydicom import pixels as of

    try:
        about = pydicom.dcmread(io.BytesIO(data))
        if "PixelData" not in about:
            raise Unreadable("a DICOM file without pixel data")
        check_size((int(about.Columns), int(about.Rows)), max_pixels)
        if (frames := int(about.get("NumberOfFrames") or 1)) > 1:
            raise Unreadable(f"a DICOM file of {frames} frames, where one was expected: write one file a frame")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable("a damaged DICOM file") from error
    try:
        values: np.ndarray = of.pixel_array(about, raw=False)
        if about.PhotometricInterpretation == "PALETTE COLOR":
            values = of.apply_color_lut(values, about)
    except Exception as error:
        syntax = about.file_meta.TransferSyntaxUID
        if syntax.is_compressed:
            plugins = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg reads more of them"
            raise Unreadable(f"a DICOM file damaged or compressed as {syntax.name}: {plugins}") from error
        raise Unreadable("a DICOM file with incomplete pixel data") from error
    return about, values.reshape(*values.shape[:2], -1)


def _is_grey(about: Any) -> bool:
    return str(about.PhotometricInterpretation) in GREY


def _limits(about: Any) -> tuple[float, float]:
    """The smallest and the largest value that can be stored."""
    bits = int(about.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if about.PixelRepresentation else (0, 2**bits - 1)


def _rescale(about: Any) -> tuple[float, float] | None:
    """Slope and intercept, where the file states any."""
    slope, intercept = about.get("RescaleSlope"), about.get("RescaleIntercept")
    if slope is None and intercept is None:
        return None
    return float(1 if slope is None else slope), float(0 if intercept is None else intercept)


def _window(about: Any, window: Window) -> tuple[float, float, str]:
    """Centre, width and function."""
    if window is not None and not isinstance(window, str):
        return float(window[0]), float(window[1]), "LINEAR"
    centre, width = (about.get(name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        raise Unreadable("a DICOM file that states no window: give dataset.window=[CENTRE,WIDTH]")
    return _first(centre), _first(width), str(about.get("VOILUTFunction") or "LINEAR")


def _first(value: Any) -> float:
    """The first number of a field that may have several."""
    return float(value) if isinstance(value, (int, float, str)) else float(value[0])


def _windowed(x: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Values from 0 to 1 by the functions of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - centre) / width, -60, 60))))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    return np.clip((x - centre) / width + 0.5, 0, 1)
