"""Images of any number of channels, in the type in which a file holds them: nothing is cut to eight bits or to RGB.

``[H, W, C]`` of `TYPES`. PNG is read by OpenCV, TIFF by tifffile (extra ``tiff``), DICOM by pydicom (extra ``dicom``),
npy and npz by numpy, everything else as `decode` reads it. What is dropped: of a TIFF file all but its first series of
pages (reduced copies, masks), and all fractions of 64 bits beyond the precision of 32. What is kept: alpha, as a
further channel; the pages of a TIFF file, as channels, where each has a single one.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from selfsight.datamodules.images import decode, dicom, formats
from selfsight.datamodules.images.dicom import Window
from selfsight.datamodules.images.formats import Unreadable
from selfsight.datamodules.images.sets import ImageSet
from selfsight.errors import UserError

#: types of the values, and the value that becomes 1; fractions stay as they are
TYPES: dict[str, int] = {"uint8": 255, "uint16": 65535, "int16": 32767, "float32": 1}
#: images that statistics are computed from
MEASURED = 2000


@dataclass(frozen=True, order=True)
class Kind:
    """What the images of a set have in common: ``4 channels of uint16``."""

    channels: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.dtype}"


@dataclass(frozen=True)
class Bands:
    """Facts of a set of images that are not RGB of eight bits.

    Attributes:
        kind: channels and type of every image.
        low, high: smallest and largest value that was met.
        mean, std: of each channel, in values as `scaled` gives them.
        images: how many these figures are from.
    """

    kind: Kind
    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int

    @property
    def colour(self) -> bool:
        """Whether saturation and hue mean something: three channels, taken for red, green, blue, from 0 to 1."""
        full = TYPES[self.kind.dtype]
        return self.kind.channels == 3 and 0 <= self.low <= self.high <= full

    def to_json(self) -> dict[str, Any]:
        """As plain containers: what `of` reads."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Bands:
        """What `to_json` gave, lists in place of tuples allowed."""
        mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
        return cls(Kind(**content["kind"]), content["low"], content["high"], mean, std, content["images"])

    def __str__(self) -> str:
        def told(values: Sequence[float]) -> str:
            return ", ".join(f"{value:.4g}" for value in values)

        return (
            f"{self.kind}, {self.low:g} to {self.high:g}; by channel, where 1 is {TYPES[self.kind.dtype]:,}: "
            f"mean {told(self.mean)}, std {told(self.std)} (of {self.images:,} images)"
        )


def scaled(image: np.ndarray | Tensor) -> Any:
    """Values as 32-bit floats, the largest of a type of whole numbers as 1; of an array or a tensor."""
    if isinstance(image, Tensor):
        return image.float() / TYPES[str(image.dtype).removeprefix("torch.")]
    return image.astype(np.float32) / np.float32(TYPES[image.dtype.name])


# --- reading ---------------------------------------------------------------------------------------------------------


def read_bands(path: Path | str, max_pixels: int = decode.MAX_PIXELS) -> np.ndarray:
    """The image in a file, ``[H, W, C]`` in its own type; raises `Unreadable`."""
    return decode_bands(formats.read_file(path, decode.most_bytes(max_pixels)), max_pixels)


@formats.refusing
def decode_bands(data: bytes, max_pixels: int = decode.MAX_PIXELS, window: Window = None) -> np.ndarray:
    """Encoded image to ``[H, W, C]`` in its own type.

    Args:
        window: of DICOM's grey values, see `dicom.read`.

    Raises:
        Unreadable: no image, an incomplete one, one of more than ``max_pixels``, of a type beside `TYPES`, or with
            values that are no numbers.
    """
    of = formats.kind(data[: formats.START])
    if of == "png":
        image = _png(data, max_pixels)
    elif of == "tiff":
        image = _tiff(data, max_pixels)
    elif of in ("npy", "npz"):
        image = _array(data, of, max_pixels)
    elif of == "dicom" and not formats.lacking_decoder(of):
        image = dicom.read(data, max_pixels, window)
    elif of == "pnm" and formats.largest_of_pnm(data) > 255:
        image = _unchanged(data)
    else:
        image = decode.decode(data, max_pixels)
    if image.dtype == np.float16 or image.dtype == np.float64:
        image = image.astype(np.float32)
    if image.dtype.name not in TYPES:
        raise Unreadable(f"pixels of {image.dtype.name}, where one of {', '.join(TYPES)} was expected")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise Unreadable("pixels that are no numbers")
    if image.size == 0:
        raise Unreadable("no pixels")
    decode.check_size((image.shape[1], image.shape[0]), max_pixels)
    return np.ascontiguousarray(image)


def _png(data: bytes, max_pixels: int) -> np.ndarray:
    decode.check_size(formats.size(data, "png"), max_pixels)
    if not formats.has_end(data):
        raise Unreadable("incomplete image")
    image = _unchanged(data)
    return image[..., 2:] if data[25] == GREY_WITH_ALPHA and image.shape[2] == 4 else image


def _unchanged(data: bytes) -> np.ndarray:
    """What OpenCV reads, red first."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise Unreadable("no image")
    image = image[..., None] if image.ndim == 2 else image
    return image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] > 2 else image


def _tiff(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF file of channels beside RGB; pip install 'selfsight[tiff]' reads them") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            decode.check_size((int(page.imagewidth), int(page.imagelength)), max_pixels)
            series = file.series[0]
            image, axes = (page.asarray(), page.axes) if page.samplesperpixel > 1 else (series.asarray(), series.axes)
            inverted = int(page.photometric) == decode.BLACK_ON_WHITE
    except Unreadable:
        raise
    except Exception as error:  # tifffile raises whatever its decoders stumble over
        raise Unreadable("a damaged TIFF file, or one of a rare kind") from error
    if inverted and image.dtype.kind == "u":
        image = np.iinfo(image.dtype).max - image
    image = np.moveaxis(image, (axes.index("Y"), axes.index("X")), (0, 1))
    image = image.reshape(*image.shape[:2], -1)
    return image.astype(image.dtype.newbyteorder("="))


def _array(data: bytes, of: str, max_pixels: int) -> np.ndarray:
    """An array as an image: of three sides the channels are the shorter of the first and the last, the last of two."""
    try:
        if of == "npz":
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                names = [name for name in file.namelist() if name.endswith(".npy")]
                wanted = ("image.npy", "arr_0.npy") if len(names) > 1 else names
                name = next((each for each in wanted if each in names), None)
                if name is None:
                    raise Unreadable("an npz file of several arrays, none called image")
                if file.getinfo(name).file_size > decode.most_bytes(max_pixels):
                    raise Unreadable(formats.TOO_LARGE)
                data = file.read(name)
        if claimed_bytes(data) > decode.most_bytes(max_pixels):
            raise Unreadable(formats.TOO_LARGE)
        content = np.load(io.BytesIO(data), allow_pickle=False)
    except Unreadable:
        raise
    except Exception as error:  # numpy raises whatever zip files and headers stumble over
        raise Unreadable("a damaged npy file, or one of Python objects") from error
    if content.ndim == 2:
        content = content[..., None]
    if content.ndim != 3:
        raise Unreadable(f"an array of {content.ndim} dimensions, where 2 or 3 were expected")
    image: np.ndarray = np.moveaxis(content, 0, -1) if content.shape[0] < content.shape[-1] else content
    return image.astype(image.dtype.newbyteorder("="))


def claimed_bytes(data: bytes) -> int:
    """How many bytes an npy file says that its values take."""
    file = io.BytesIO(data)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
    if read is None:  # of names in other letters than ASCII, as structures have them
        raise Unreadable("an array of structures")
    shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


# --- which channels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandDecoder:
    """Bytes of a file to the channels that were chosen.

    Attributes:
        kind: of every file. chosen: places of the channels, from 0 on, in their order; None: all of them.
        window: of DICOM's grey values, see `dicom.read`.
    """

    kind: Kind
    chosen: tuple[int, ...] | None = None
    window: Window = None

    def __call__(self, data: bytes, max_pixels: int) -> np.ndarray:
        image = decode_bands(data, max_pixels, self.window)
        if (kind := Kind(image.shape[2], image.dtype.name)) != self.kind:
            raise Unreadable(f"{kind} where the others have {self.kind}")
        return image if self.chosen is None else np.ascontiguousarray(image[..., self.chosen])

    @property
    def made(self) -> Kind:
        """What comes out."""
        return self.kind if self.chosen is None else Kind(len(self.chosen), self.kind.dtype)


def decoder(
    channels: str | int | Sequence[int], kinds: Mapping[Kind | None, Sequence[str]], window: Window = None
) -> BandDecoder | None:
    """How the files of a data set are read; None: as RGB of eight bits.

    Args:
        channels: ``auto``: RGB of eight bits where all files are such colour images, else every channel. ``rgb``: RGB
            of eight bits whatever they are. A number: the first so many. A list: these, from 1 on, in this order.
        kinds: of what kind the files are (None: a colour image of eight bits), and which they are.

        window: of DICOM's grey values, see `dicom.read`.

    Raises:
        UserError: files of several kinds, fewer channels than were asked for, or a window for colours.
    """
    if window is not None and (channels == "rgb" or set(kinds) <= {None}):
        raise UserError(
            "dataset.window is for the grey values of DICOM files, and these images are read as RGB of 8 bits: leave "
            "it out."
        )
    if channels == "rgb" or (channels in ("auto", 3) and set(kinds) <= {None}):
        return None
    if len(kinds) > 1:
        counts = sorted(kinds.items(), key=lambda item: -len(item[1]))
        told = ", ".join(f"{len(names):,} of {kind or COLOUR} (such as '{names[0]}')" for kind, names in counts)
        raise UserError(
            f"the images have different channels or types: {told}. Sort them into folders of one kind, or set "
            "dataset.channels=rgb to see them all as RGB of 8 bits."
        )
    kind = next(iter(kinds)) or Kind(3, "uint8")
    if channels == "auto":
        return BandDecoder(kind, window=window)
    chosen = tuple(range(channels)) if isinstance(channels, int) else tuple(int(c) - 1 for c in channels)
    if max(chosen) >= kind.channels:
        asked = channels if isinstance(channels, int) else list(channels)
        raise UserError(
            f"dataset.channels is {asked}, and the images have {kind}: choose among 1 to {kind.channels}, or auto."
        )
    return BandDecoder(kind, None if chosen == tuple(range(kind.channels)) else chosen, window)


# --- facts -----------------------------------------------------------------------------------------------------------


class Measuring:
    """Smallest and largest value, mean and standard deviation of each channel, and the sizes, image by image."""

    def __init__(self) -> None:
        self.images, self.pixels = 0, 0
        self.sizes: list[tuple[int, int]] = []  # width, height
        self.low, self.high = float("inf"), float("-inf")
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, image: np.ndarray) -> None:
        flat = scaled(image).reshape(-1, image.shape[2]).astype(np.float64)
        self.images, self.pixels = self.images + 1, self.pixels + len(flat)
        self.sizes.append((image.shape[1], image.shape[0]))
        self.low, self.high = min(self.low, float(image.min())), max(self.high, float(image.max()))
        self._sum, self._squares = self._sum + flat.sum(0), self._squares + np.square(flat).sum(0)

    def result(self, kind: Kind) -> Bands:
        mean = self._sum / self.pixels
        std = np.sqrt(np.maximum(self._squares / self.pixels - mean**2, 0))
        std = np.where(std > 1e-8 * np.maximum(np.abs(mean), 1), std, 1.0)  # a channel of one value: centred alone
        return Bands(kind, self.low, self.high, tuple(mean.tolist()), tuple(std.tolist()), self.images)


def measure(images: ImageSet, kind: Kind, most: int | None = MEASURED) -> Bands:
    """Facts of a set from ``most`` of its images, see `measuring`."""
    return measuring(images, most).result(kind)


def measuring(images: ImageSet, most: int | None = MEASURED) -> Measuring:
    """What ``most`` images of a set are like, evenly spread; None: all.

    Raises:
        UserError: none of them can be read.
    """
    found, reason = Measuring(), "there is none"
    count = len(images) if most is None else min(most, len(images))
    for index in np.linspace(0, len(images) - 1, count).astype(int).tolist():
        try:
            found.add(images.read(index))
        except Unreadable as error:
            reason = str(error)
    if not found.images:
        raise UserError(f"no image can be read ({reason}), so that mean and std cannot be computed.")
    return found


# --- the kind of a file, from its header -----------------------------------------------------------------------------

#: colours and alpha of PNG's types of colour
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
GREY_WITH_ALPHA = 4
COLOUR = "8-bit colour"


#: of a file that is damaged: whoever reads it will say so
UNTOLD = Kind(0, "")


def stored_kind(
    start: bytes, opened: Callable[[], AbstractContextManager[IO[bytes]]], window: Window = None
) -> Kind | None:
    """The kind of a file that begins so; None for a colour image of eight bits, `UNTOLD` where it cannot be told.

    Grey, palettes, CMYK and alpha count as colour where they have eight bits or fewer; arrays never do.

    Args:
        opened: the whole file, for those of which the start does not tell. window: see `dicom.read`.
    """
    of = formats.kind(start)
    if of == "png":
        depth, colours = start[24:25], start[25:26]
        return Kind(_PNG_CHANNELS.get(ord(colours), 3), "uint16") if depth == b"\x10" and colours else None
    if of not in ("tiff", "npy", "npz", "pnm", "dicom") or (of == "pnm" and formats.largest_of_pnm(start) < 256):
        return None
    try:
        with opened() as file:
            if of == "tiff":
                return _kind_of_tiff(file)
            if of == "dicom":
                told = None if formats.lacking_decoder(of) else dicom.kind(file, window)
                return None if told is None else Kind(*told)
            image = decode_bands(file.read())
    except (OSError, Unreadable):
        return UNTOLD
    return Kind(image.shape[2], image.dtype.name)


def kind_of_file(path: Path, start: bytes | None = None, window: Window = None) -> Kind | None:
    """`stored_kind` of a file."""
    try:
        return stored_kind(formats.first_bytes(path) if start is None else start, lambda: path.open("rb"), window)
    except Unreadable:
        return UNTOLD


def kind_of_bytes(content: bytes, window: Window = None) -> Kind | None:
    """`stored_kind` of what a file holds."""
    return stored_kind(content[: formats.START], lambda: io.BytesIO(content), window)


def _kind_of_tiff(file: IO[bytes]) -> Kind | None:
    pages = formats.tiff_pages(file)
    if not pages:
        return UNTOLD
    first = pages[0]
    size, bits, samples = first.size, first.bits, first.samples
    stack = sum((page.size, page.bits, page.samples) == (size, bits, samples) for page in pages) if samples == 1 else 1
    colours = first.photometric not in (decode.BLACK_ON_WHITE, decode.WHITE_ON_BLACK, decode.RGB)
    alpha = first.photometric == decode.RGB and samples == 4 and first.extra in (1, 2)
    grey = samples - first.alphas == 1 and stack == 1
    if bits <= 8 and first.format != "f" and (colours or samples == 3 or alpha or grey):
        return None
    return Kind(samples * stack, _dtype(first.format, bits))


def _dtype(form: str, bits: int) -> str:
    """The type that samples of so many bits are read as."""
    if form == "f":
        return "float32"
    width = next((w for w in (8, 16, 32, 64) if bits <= w), bits)
    return f"{'uint' if form == 'u' else 'int'}{width}"
