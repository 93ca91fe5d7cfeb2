"""What an image file says of itself before it is decoded: its format, its size in pixels, whether it is whole.

Contents decide, not names. Needs neither torch nor a decoder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, ParamSpec, TypeVar

from selfsight.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

#: endings of names taken for images when a folder is searched; what has another one, or none, is looked into
EXTENSIONS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
])  # fmt: skip
#: endings of files that hold many images: tars, tables, arrays
TARS, TABLES, ARRAYS = (".tar",), (".parquet", ".arrow"), (".h5", ".hdf5")
OF_MANY = (*TARS, *TABLES, *ARRAYS)
#: endings of photographs as the sensor has them: they look like TIFF files, and hold no finished picture
SENSOR_DATA = frozenset([
    ".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw", ".orf",
    ".pef", ".rw2", ".sr2", ".srf", ".srw",
])  # fmt: skip

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
TIFF_STARTS = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
JP2_STARTS = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
AVIF_BRANDS = frozenset([b"avif", b"avis"])
HEIC_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
#: sizes of the header after a BMP's own, by which it is told from a text that begins with BM
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)

NPY_START = b"\x93NUMPY"
ZIP_START = b"PK\x03\x04"

_PNM = re.compile(rb"P[1-6](?:\s+\d|\s*#)")

#: where a DICOM file says that it is one
DICOM_AT, DICOM = 128, b"DICM"

TOO_LARGE = "larger than any image of the size that is allowed"

#: bytes that tell the format
START = DICOM_AT + len(DICOM)
#: bytes of a file's beginning, middle and end by which it is known again
PIECE = 4096
#: of the end alone, where files hold pixels and nothing else
TAIL = 1024


class Unreadable(Exception):
    """A file that is no image, or a damaged one; the message is the reason in a few words."""


def refusing(read: Callable[P, T]) -> Callable[P, T]:
    """A reader of files out of which `Unreadable` comes, whatever it stumbles over in one that is damaged."""

    @functools.wraps(read)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (Unreadable, UserError):
            raise
        except Exception as error:
            raise Unreadable(f"damaged image: {type(error).__name__}") from error

    return guarded


def kind(start: bytes) -> str | None:
    """The format of a file that begins so; None where no image does."""
    if start[DICOM_AT : DICOM_AT + len(DICOM)] == DICOM:
        return "dicom"
    if start.startswith(JPEG_START):
        return "jpeg"
    if start.startswith(PNG_START):
        return "png"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "webp"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if start.startswith(TIFF_STARTS):
        return "tiff"
    if start.startswith(b"BM") and int.from_bytes(start[14:18], "little") in BMP_HEADERS:
        return "bmp"
    if _PNM.match(start):
        return "pnm"
    if start.startswith(NPY_START):
        return "npy"
    if start.startswith(ZIP_START) and start[30:].startswith(_first_array(start)):
        return "npz"
    if start.startswith(JP2_STARTS):
        return "jp2"
    if start[4:8] == b"ftyp":
        box = start[: int.from_bytes(start[:4], "big")]
        brands = {box[8:12], *(box[at : at + 4] for at in range(16, len(box), 4))}
        return "avif" if brands & AVIF_BRANDS else "heic" if brands & HEIC_BRANDS else None
    return None


def _first_array(start: bytes) -> bytes:
    """The name that a zip file of numpy's begins with, as far as it is there."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    return name if name.endswith(b".npy") else b"\0"


@functools.cache
def lacking_decoder(of: str) -> str:
    """What would read this format, where nothing here does; an empty string where it can be read."""
    if of == "heic" and importlib.util.find_spec("pillow_heif") is None:
        return "pip install 'selfsight[heif]' reads them"
    if of == "dicom" and importlib.util.find_spec("pydicom") is None:
        return "pip install 'selfsight[dicom]' reads them"
    if of == "avif":
        from PIL import features

        return "" if "avif" in features.modules and features.check("avif") else "Pillow 11.3 or newer reads them"
    return ""


# --- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file, and its length: nothing is waited for, and nothing without an end is read.

    Raises:
        Unreadable: no such file, none that may be read, a pipe, a socket or a device; or reading it failed.
    """
    try:
        regular(os.stat(path))
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            yield file, regular(os.fstat(file.fileno())).st_size  # it may be another one by now
    except OSError as error:
        raise Unreadable(reason(error)) from None


def read_file(path: Path | str, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Raises:
        Unreadable: see `opened`; or there are more than ``most``.
    """
    with opened(path) as (file, length):
        if most is not None and length > most:
            raise Unreadable(TOO_LARGE)
        return file.read()


def first_bytes(path: Path | str) -> bytes:
    """The bytes of a regular file by which `kind` tells its format; see `opened`."""
    with opened(path) as (file, _):
        return file.read(START)


def regular(about: os.stat_result) -> os.stat_result:
    """What is known of a file, which is one of bytes on a disk.

    Raises:
        Unreadable: it is not.
    """
    if not stat.S_ISREG(about.st_mode):
        raise Unreadable(special(about.st_mode) or "no file")
    return about


def special(mode: int) -> str:
    """What a name stands for that is neither a file nor a folder, in words."""
    names = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    named = next((name for fits, name in names.items() if fits(mode)), "a folder" if stat.S_ISDIR(mode) else "")
    return f"{named}, no file" if named else ""


def reason(error: OSError) -> str:
    """Why a file cannot be opened, in a few words."""
    return "a link in a circle" if error.errno == errno.ELOOP else error.strerror or "cannot be opened"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class Look(NamedTuple):
    """What a short look at a file tells.

    Attributes:
        whole: whether it seems a complete image; see `look`.
        print: by which it is known again: length, and a hash of its beginning, middle and end; empty where there is no
            such file.
        tail: hash of its last bytes, which copies with other metadata share.
        start: its first bytes, by which `kind` tells its format.
    """

    whole: bool
    print: str = ""
    tail: bytes = b""
    start: bytes = b""


def look(path: Path | str) -> Look:
    """Whether a file is a complete image, as far as can be told without decoding it, and its print.

    A JPEG or PNG is when it has an end, WebP and BMP files say how long they are, and of the other formats only the
    start is looked at.
    """
    try:
        with opened(path) as (file, length):
            pieces = [file.read(PIECE)]
            for at in (length // 2, max(PIECE, length - PIECE)) if length > PIECE else ():
                file.seek(at)
                pieces.append(file.read(PIECE))
    except Unreadable:
        return Look(False)
    start, end = pieces[0], (pieces[0] + pieces[-1] if len(pieces) > 1 else pieces[0])[-PIECE:]
    mark = hashlib.blake2b(b"".join(pieces), digest_size=6).hexdigest()
    print_, tail = f"{length}-{mark}", hashlib.blake2b(end[-TAIL:], digest_size=16).digest()
    if start.startswith((JPEG_START, PNG_START)):
        whole = end.endswith((JPEG_END, PNG_END)) or _has_end_somewhere(path)
    else:
        stated = _stated_length(start)
        whole = stated is not None and stated <= length
    return Look(whole, print_, tail, start[:START])


def looks_whole(path: Path | str) -> bool:
    """See `look`."""
    return look(path).whole


def _has_end_somewhere(path: Path | str) -> bool:
    try:
        return has_end(read_file(path))
    except Unreadable:
        return False


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
    of = kind(start)
    if of == "webp":
        return 8 + int.from_bytes(start[4:8], "little")
    if of == "bmp":
        return int.from_bytes(start[2:6], "little")
    return None if of is None else 0


# --- size ------------------------------------------------------------------------------------------------------------


def size(data: bytes, of: str) -> tuple[int, int] | None:
    """Width and height in pixels as the header of a JPEG, PNG or WebP has them; None where it has none."""
    if of == "png":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return _size_of_jpeg(data) if of == "jpeg" else _size_of_webp(data)


def check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    """Refuse an image of (width, height); raises `Unreadable`."""
    if size is not None and size[0] * size[1] > max_pixels:
        raise Unreadable(f"too many pixels: {size[0]} x {size[1]}, dataset.max_pixels is {max_pixels}")


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    at, length = 2, len(data)
    while at + 9 < length and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
        elif marker == 0xDA:
            return None
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _size_of_webp(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return width, height
    return None


def is_animation(data: bytes, of: str) -> bool:
    """Whether a PNG or WebP holds several pictures, of which the first is not always the one that stands for it."""
    if of == "webp":
        return data[12:16] == b"VP8X" and bool(data[20] & 2)
    first = data.find(b"IDAT")
    return b"acTL" in (data[:first] if first > 0 else data)


# --- what the values are ---------------------------------------------------------------------------------------------

_PNM_LARGEST = re.compile(rb"P[2356]" + 3 * rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})")


def largest_of_pnm(data: bytes) -> int:
    """The value that is white in a PNM file; 0 where it does not say."""
    header = _PNM_LARGEST.match(data)
    return 0 if header is None else int(header[3])


class TiffPage(NamedTuple):
    """What a page of a TIFF file says of its values.

    Attributes:
        size: width and height. bits: of a sample. samples: of a pixel. extra: what the first sample beyond the colours
            is (1 and 2: alpha). alphas: how many such samples are alpha.
        format: ``u``, ``i`` or ``f``.
    """

    size: tuple[int, int]
    bits: int
    samples: int
    photometric: int
    format: str
    extra: int
    alphas: int


#: pages of a TIFF file that are looked at
MOST_PAGES = 4096


def tiff_pages(file: IO[bytes]) -> list[TiffPage]:
    """The pages of a TIFF file in their order, by their tags alone; none where it is damaged."""
    try:
        return list(_tiff_pages(file))
    except (struct.error, ValueError, OverflowError, IndexError):
        return []


def _tiff_pages(file: IO[bytes]) -> Iterator[TiffPage]:
    file.seek(0)
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = struct.unpack(order + "H", start[2:4])[0] == 43
    offset = struct.unpack(order + ("Q" if big else "I"), start[8:16] if big else start[4:8])[0]
    for _ in range(MOST_PAGES):
        if not offset:
            return
        file.seek(offset)
        count = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))[0]
        width = 20 if big else 12
        block = file.read(min(count, 4096) * width)
        offset = struct.unpack(order + ("Q" if big else "I"), file.read(8 if big else 4))[0]
        tags = {}
        for at in range(0, len(block), width):
            tag, of, number = struct.unpack(order + ("HHQ" if big else "HHI"), block[at : at + (12 if big else 8)])
            if tag in _TAGS and of in (1, 3, 4):
                tags[tag] = _tiff_values(file, order, of, number, block[at + (12 if big else 8) : at + width])
        size = tags.get(256, (0,))[0], tags.get(257, (0,))[0]
        extra = tags.get(338, ())
        form = {2: "i", 3: "f"}.get(tags.get(339, (1,))[0], "u")
        alphas = sum(each in (1, 2) for each in extra)
        bits, samples, photometric = (tags.get(tag, (other,))[0] for tag, other in ((258, 1), (277, 1), (262, 1)))
        yield TiffPage(size, bits, samples, photometric, form, extra[0] if extra else 0, alphas)


_TAGS = (256, 257, 258, 262, 277, 338, 339)


def _tiff_values(file: IO[bytes], order: str, of: int, count: int, field: bytes) -> tuple[int, ...]:
    """The first numbers of a tag of bytes, shorts or longs, which stand in its field or where that points to."""
    letter, width = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}[of]
    wanted = min(count, 64)
    if count * width > len(field):
        here = file.tell()
        file.seek(struct.unpack(order + ("Q" if len(field) == 8 else "I"), field)[0])
        field = file.read(wanted * width)
        file.seek(here)
    return struct.unpack(f"{order}{wanted}{letter}", field[: wanted * width])
