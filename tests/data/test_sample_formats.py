"""An image is what its file says by the definition of its format: each kind of sample against what was written.

Files are written by tifffile, Pillow or by hand, and read again by readers that are not ours (tifffile, imageio,
Pillow), so that what is expected does not come from the code that is tested.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import torch
from hydra.utils import instantiate  # noqa: F401 - the first import of Hydra is slow, and timed elsewhere
from PIL import Image

from selfsight.datamodules import folder
from selfsight.datamodules.datasets.preparing import Preparation
from selfsight.datamodules.images import decode as decoding
from selfsight.datamodules.images.decode import Unreadable, decode, read_image
from selfsight.datamodules.views.view import View

from .test_module import module
from .writers import encoded, picture

RGB = picture(1, 16, 24)
GREY = picture(2, 16, 24, 1)
ALPHA = np.linspace(0, 255, GREY.size).round().astype(np.uint8).reshape(GREY.shape)
#: alpha 0 leaves no colour behind it to be found again
OPAQUE = np.maximum(ALPHA, 40)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def tiff(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def grey_tiff(samples: np.ndarray, **options: Any) -> bytes:
    return tiff(samples, **{"photometric": "minisblack", **options})


def rgb_tiff(samples: np.ndarray, **options: Any) -> bytes:
    return tiff(samples, **{"photometric": "rgb", **options})


def times_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = (alpha / 255)[..., None] if colours.ndim == 3 else alpha / 255
    return np.rint(colours * share).astype(np.uint8)


def packed_12_bits(values: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits a sample, by hand."""
    high, low = values.reshape(-1)[::2].astype(int), values.reshape(-1)[1::2].astype(int)
    data = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
        (278, 4, height), (279, 4, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def pnm(kind: str, largest: int, samples: np.ndarray, comment: str = "") -> bytes:
    height, width = samples.shape[:2]
    stored = samples.astype(np.uint8 if largest < 256 else ">u2")
    return f"{kind}\n{comment}{width} {height}\n{largest}\n".encode() + stored.tobytes()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *between: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    extra = b"".join(chunk(*each) for each in between)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animated(kind: str, **options: Any) -> bytes:
    others = [Image.fromarray(255 - RGB), Image.fromarray(RGB[::-1].copy())]
    return encoded(Image.fromarray(RGB), kind, save_all=True, append_images=others, **options)


def bmp_565(values: np.ndarray) -> bytes:
    """16 bits a pixel: 5 of red, 6 of green, 5 of blue, the rows from the top."""
    height, width = values.shape[:2]
    red, green, blue = (values[..., i].astype(int) for i in range(3))
    data = (red << 11 | green << 5 | blue).astype("<u2").tobytes()
    sizes = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 16, 3, len(data), 0, 0, 0, 0)
    header = sizes + struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


def binary_pnm(kind: str, largest: int) -> tuple[bytes, np.ndarray, int]:
    image = GREY if kind == "P5" else RGB
    values = np.rint(image / 255 * largest).astype(int)
    expected = (np.floor(values * 255 / largest + 0.5) if largest < 65535 else values >> 8).astype(np.uint8)
    return pnm(kind, largest, values, "# of a camera\n"), expected if kind == "P6" else three(expected), 0


SIXTEEN = GREY.astype(np.uint16) * 257
WIDE = RGB.astype(np.uint16) * 257
PALETTE = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16)
INDICES = np.random.default_rng(1).integers(0, 256, GREY.shape).astype(np.uint8)
FIVE_SIX_FIVE = np.stack([RGB[..., 0] >> 3, RGB[..., 1] >> 2, RGB[..., 2] >> 3], -1)
ORANGE = np.array([[[200, 120, 40]]], np.uint8)
P_IMAGE = Image.fromarray(RGB).quantize(16)

#: name: the file, what it holds as [H, W, 3] uint8, and how many levels a rounding may differ
FILES: dict[str, tuple[bytes, np.ndarray, int]] = {
    # alpha
    "tiff alpha": (rgb_tiff(np.dstack([RGB, ALPHA]), extrasamples=["unassalpha"]), RGB, 0),
    "tiff alpha, colours multiplied by it": (
        rgb_tiff(np.dstack([times_alpha(RGB, OPAQUE), OPAQUE]), extrasamples=["assocalpha"]), RGB, 7,
    ),
    "tiff fourth channel of no meaning": (rgb_tiff(np.dstack([RGB, ALPHA]), extrasamples=["unspecified"]), RGB, 0),
    "tiff 16 bits, alpha": (
        rgb_tiff(np.dstack([RGB, ALPHA]).astype(np.uint16) * 257, extrasamples=["unassalpha"]), RGB, 0,
    ),
    "tiff grey, alpha": (grey_tiff(np.dstack([GREY, ALPHA]), extrasamples=["unassalpha"]), three(GREY), 0),
    "tiff grey multiplied by alpha": (
        grey_tiff(np.dstack([times_alpha(GREY, OPAQUE), OPAQUE]), extrasamples=["assocalpha"]), three(GREY), 7,
    ),
    "tiff grey 16 bits, alpha": (
        grey_tiff(np.dstack([GREY, ALPHA]).astype(np.uint16) * 257, extrasamples=["unassalpha"]), three(GREY), 0,
    ),
    "png alpha": (encoded(np.dstack([RGB, ALPHA]), "PNG"), RGB, 0),
    "webp alpha": (encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), RGB, 0),
    "png grey 16 bits, alpha": (
        png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0x4DFF, 0x1000)), np.full((1, 1, 3), 0x4D, np.uint8), 0,
    ),
    # a palette, and one colour of it or of the image that is transparent
    "png palette, transparent": (encoded(P_IMAGE, "PNG", transparency=3), np.asarray(P_IMAGE.convert("RGB")), 0),
    "png palette, half transparent": (
        encoded(P_IMAGE, "PNG", transparency=bytes(range(0, 256, 16))), np.asarray(P_IMAGE.convert("RGB")), 0,
    ),
    "gif palette, transparent": (encoded(P_IMAGE, "GIF", transparency=3), np.asarray(P_IMAGE.convert("RGB")), 0),
    "png one colour transparent": (encoded(RGB, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB, 0),
    "png grey, one level transparent": (encoded(GREY, "PNG", transparency=int(GREY[0, 0])), three(GREY), 0),
    "tiff palette": (
        tiff(INDICES, photometric="palette", colormap=PALETTE * 257), PALETTE.T[INDICES].astype(np.uint8), 0,
    ),
    # bits
    "tiff 16 bits": (grey_tiff(SIXTEEN + 200 % 257), three((SIXTEEN + 200 % 257 >> 8).astype(np.uint8)), 0),
    "tiff 12 bits": (packed_12_bits(GREY.astype(np.uint16) * 16 + 9), three(GREY), 1),
    "tiff 1 bit": (grey_tiff(GREY > 127), three((GREY > 127) * np.uint8(255)), 0),
    "tiff 32 bits": (grey_tiff(GREY.astype(np.uint32) * 0x01010101), three(GREY), 0),
    "tiff 32 bits, colour": (rgb_tiff(RGB.astype(np.uint32) * 0x01010101), RGB, 0),
    "png 2 bits": (png(4, 1, 2, 0, b"\0\x1b"), three(np.array([[0, 85, 170, 255]], np.uint8)), 0),
    "png 16 bits": (
        png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0xC8FF, 0x78FF, 0x2800)), ORANGE, 0,
    ),
    "bmp 5, 6 and 5 bits": (bmp_565(FIVE_SIX_FIVE), np.rint(FIVE_SIX_FIVE / (31, 63, 31) * 255).astype(np.uint8), 1),
    "jpeg 2000 16 bits": (encoded(SIXTEEN, "JPEG2000"), three(GREY), 0),
    # the largest value of PNM
    **{f"{kind} to {n}": binary_pnm(kind, n) for kind in ("P5", "P6") for n in (1, 100, 255, 1023, 4095, 65535)},
    "P2 to 100": (b"P2\n# text\n2 1\n100\n77 100\n", three(np.array([[196, 255]], np.uint8)), 0),
    # signs and fractions
    "tiff signed": (grey_tiff((GREY.astype(int) - 128).astype(np.int8)), three(GREY), 0),
    "tiff signed 16 bits": (grey_tiff((SIXTEEN.astype(int) - 32768).astype(np.int16)), three(GREY), 0),
    "tiff fractions": (grey_tiff(GREY.astype(np.float32) / 255), three(GREY), 0),
    "tiff fractions of 16 bits": (grey_tiff((GREY / 255).astype(np.float16)), three(GREY), 0),
    "tiff fractions of 64 bits": (grey_tiff(GREY / 255), three(GREY), 0),
    "tiff fractions, colour": (rgb_tiff((RGB / 255).astype(np.float32)), RGB, 0),
    "tiff fractions multiplied by alpha": (
        rgb_tiff(
            np.dstack([RGB / 255 * (OPAQUE / 255)[..., None], OPAQUE / 255]).astype(np.float32),
            extrasamples=["assocalpha"],
        ),
        RGB,
        0,
    ),
    # white is zero
    "tiff white is zero": (tiff(255 - GREY, photometric="miniswhite"), three(GREY), 0),
    "tiff white is zero, 16 bits": (tiff(65535 - SIXTEEN, photometric="miniswhite"), three(GREY), 0),
    "tiff white is zero, 1 bit": (
        tiff(GREY <= 127, photometric="miniswhite"), three((GREY > 127) * np.uint8(255)), 0,
    ),
    "tiff white is zero, fractions": (
        tiff((1 - GREY / 255).astype(np.float64), photometric="miniswhite"), three(GREY), 0,
    ),
    # order of bytes and of channels
    "tiff 16 bits, high byte first": (grey_tiff(SIXTEEN, byteorder=">"), three(GREY), 0),
    "tiff 16 bits of colour, high byte first": (rgb_tiff(WIDE, byteorder=">"), RGB, 0),
    "tiff channel by channel": (rgb_tiff(np.moveaxis(RGB, 2, 0), planarconfig="separate"), RGB, 0),
    "tiff channel by channel, 16 bits": (
        rgb_tiff(np.moveaxis(WIDE, 2, 0), planarconfig="separate", byteorder=">", compression="zlib"), RGB, 0,
    ),
    "tiff channel by channel, fractions": (
        rgb_tiff(np.moveaxis(RGB / 255, 2, 0).astype(np.float32), planarconfig="separate"), RGB, 0,
    ),
    "tiff of more than 4 GiB in form": (rgb_tiff(RGB, bigtiff=True), RGB, 0),
    "tiff in tiles": (rgb_tiff(np.tile(RGB, (4, 4, 1)), tile=(16, 16)), np.tile(RGB, (4, 4, 1)), 0),
    # colours of other kinds
    "tiff cmyk": (
        tiff(np.dstack([255 - RGB, np.zeros_like(GREY)]), photometric="separated"), RGB, 0,
    ),
    "png with a gamma that is not applied": (
        png(1, 1, 8, 2, b"\0\xc8\x78\x28", (b"gAMA", struct.pack(">I", 100_000))), ORANGE, 0,
    ),
    # several pictures
    "png animation, its default image apart": (animated("PNG", default_image=True), RGB, 0),
    "png animation": (animated("PNG"), RGB, 0),
    "webp animation": (animated("WEBP", lossless=True), RGB, 0),
    "gif animation": (
        encoded(P_IMAGE, "GIF", save_all=True, append_images=[Image.new("RGB", P_IMAGE.size)]),
        np.asarray(P_IMAGE.convert("RGB")), 0,
    ),
    "tiff pages": (rgb_tiff(np.stack([RGB, 255 - RGB])), RGB, 0),
    "avif": (encoded(RGB, "AVIF", quality=100, subsampling="4:4:4"), RGB, 3),
    "avif animation": (animated("AVIF", quality=100, subsampling="4:4:4"), RGB, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_was_written_is_read(name: str) -> None:
    data, expected, levels = FILES[name]
    got = decode(data)
    assert (got.dtype, got.shape) == (np.uint8, expected.shape)
    assert np.abs(got.astype(int) - expected).max() <= levels


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("tiff") and "12 bits" not in name])
def test_tifffile_finds_the_same_samples(name: str) -> None:
    """The files are what their names say: tifffile reads samples of which ours follow by the definition."""
    data, expected, levels = FILES[name]
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        samples = page.asarray()
        meaning = tifffile.PHOTOMETRIC(page.photometric).name
        extra = [tifffile.EXTRASAMPLE(each).name for each in page.extrasamples]
        if page.planarconfig == 2:
            samples = np.moveaxis(samples, 0, -1)
        if meaning == "PALETTE":
            samples = page.colormap.T[samples] >> 8
    if samples.dtype == bool:
        samples = samples * np.uint8(255)
    share = samples.astype(float)
    if samples.dtype.kind in "iu":
        limits = np.iinfo(np.uint8 if meaning == "PALETTE" else samples.dtype)
        share = (share - limits.min) / (float(limits.max) - limits.min)
    share = share[..., None] if share.ndim == 2 else share
    if meaning == "MINISWHITE":
        share = 1 - share
    if meaning == "SEPARATED":
        share = (1 - share[..., :3]) * (1 - share[..., 3:])
    colours = share[..., : share.shape[-1] - len(extra)] if extra else share
    if extra == ["ASSOCALPHA"]:
        colours = colours / share[..., -1:]
    assert np.abs(colours * 255 - expected).max() <= max(levels, 1)


@pytest.mark.parametrize(
    "name", ["P5 to 255", "P6 to 255", "P6 to 100", "png alpha", "webp alpha", "bmp 5, 6 and 5 bits"]
)
def test_imageio_reads_the_same(name: str) -> None:
    data, expected, levels = FILES[name]
    read = imageio.imread(data)
    read = three(read) if read.ndim == 2 else read[..., :3]
    assert np.abs(read.astype(int) - expected).max() <= max(levels, 1)


def test_cielab() -> None:
    """Against the formulas: D50 in the file, adapted to D65 by Bradford, sRGB's curve."""
    levels = np.stack(np.meshgrid([60, 128, 200], [110, 128, 150], [110, 128, 150], indexing="ij"), -1).reshape(9, 3, 3)
    stored = np.concatenate([levels[..., :1], (levels[..., 1:] - 128) % 256], -1).astype(np.uint8)
    light, a, b = levels[..., 0] / 255 * 100, levels[..., 1] - 128.0, levels[..., 2] - 128.0
    y = (light + 16) / 116
    cubes = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * (0.9642, 1.0, 0.8249)
    to_linear = np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540],
                          [0.0719453, -0.2289914, 1.4052427]])  # fmt: skip
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    got = decode(tiff(stored, photometric="cielab"))
    inside = ((linear > 0.01) & (linear < 0.99)).all(-1)  # of what sRGB can show
    assert inside.sum() > 12
    assert np.abs(got - expected)[inside].max() <= 1


def test_heic() -> None:
    import pillow_heif as heif

    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8)))).save(file, quality=95)
    assert np.abs(decode(file.getvalue()).astype(int) - np.kron(RGB, np.ones((4, 4, 1), np.uint8))).mean() < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (grey_tiff(GREY.astype(np.float32)), "pixels of 32 bits from .* to .*, where 0 to 1 was expected"),
        (grey_tiff(np.where(GREY > 9, np.nan, 0.5)), "pixels of 64 bits from nan to nan, where 0 to 1"),
        (grey_tiff(GREY.astype(np.int32)), "pixels of 32 bits that use less than a 256th of their range"),
        (tiff(WIDE, photometric="cielab"), "neither grey nor red, green and blue"),
        (pnm("P5", 100, GREY)[:-1], "incomplete image"),
        (b"P5\n" + b" " * 100_000, "no image"),
        (b"P5 " + b"9" * 5000 + b" 1 1\n", "no image"),
        (b"P6 0 4 255\n", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
    ],
)
def test_what_no_definition_says(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(data)


def test_rare_kinds_name_what_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(Unreadable, match=r"pip install 'selfsight\[tiff\]' reads more of them"):
        decode(FILES["tiff fractions, colour"][0])
    monkeypatch.setattr(decoding.formats, "lacking_decoder", lambda kind: "pip install pillow-heif reads them")
    with pytest.raises(Unreadable, match="HEIC has no decoder here: pip install pillow-heif"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


@pytest.mark.parametrize("engine", ["cpu", "device"])
@pytest.mark.parametrize("prepared", [None, "raw"])
def test_both_engines_and_prepare_read_them_so(tmp_path: Path, engine: str, prepared: str | None) -> None:
    """Each as a flat image of a colour of its own, from a folder to a batch."""
    chosen = [name for name, (_, image, _) in FILES.items() if image.shape == RGB.shape and "ani" not in name]
    for i, name in enumerate(chosen):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{i:02}.img").write_bytes(FILES[name][0])
    root = tmp_path / "set"
    if prepared is not None:
        made = Preparation(
            root, tmp_path / "out", {"encode": prepared, "shortest": None, "quality": 90, "per_shard": 9}
        )
        made.begin()
        for number in range(len(made.parts)):
            assert made.make(number) == {}
        made.finish({})
        root = tmp_path / "out"
    data = folder(root, image_size=24, test_fraction=0.0, resident=False, max_unreadable=0.0, channels="rgb")
    assert len(data.train) == len(chosen)
    whole = [View(24, crop="whole", mean=(0.0,) * 3, std=(1.0,) * 3)]
    (batch,) = module(data, whole, engine=engine, batch_size=len(chosen), last="keep").train_dataloader()
    for view, index in zip(batch.views[0], batch.indices.tolist(), strict=True):
        _, image, levels = FILES[chosen[int(data.train.name(index)[:2])]]
        enlarged = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
        difference = (view * 255 - torch.from_numpy(enlarged.copy()).permute(2, 0, 1)).abs().max()
        assert difference <= levels + 2, data.train.name(index)


def test_bytes_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(RGB, "PNG"))
    assert np.array_equal(read_image(tmp_path / "x.png"), RGB)
