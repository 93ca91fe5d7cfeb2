"""Every kind of image file becomes the same uint8 RGB that Pillow makes of it; everything else is refused by reason."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from selfsight.datamodules.images.decode import Unreadable, decode, looks_whole, read_image

from .writers import encoded, picture

PLAIN = picture(1, 24, 32)
GREY = picture(1, 24, 32, 1)


def rotated_by_tag() -> bytes:
    image = Image.fromarray(PLAIN)
    tags = image.getexif()
    tags[0x0112] = 6
    return encoded(image, quality=95, exif=tags)


def with_thumbnail() -> bytes:
    """A JPEG that carries a small one, complete with its end, before its own pixels."""
    small, large = encoded(PLAIN[:8, :8], quality=95), encoded(PLAIN, quality=95)
    return large[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + large[2:]


WITH_THUMBNAIL = with_thumbnail()

FILES = {
    "jpeg": encoded(PLAIN, quality=95),
    "progressive": encoded(PLAIN, quality=95, progressive=True),
    "grey jpeg": encoded(GREY, quality=95),
    "cmyk jpeg": encoded(Image.fromarray(PLAIN).convert("CMYK"), quality=95),
    "orientation tag": rotated_by_tag(),
    "jpeg with bytes after its end": encoded(PLAIN, quality=95) + b"trailing bytes",
    "jpeg with a thumbnail": WITH_THUMBNAIL,
    "png": encoded(PLAIN, "PNG"),
    "rgba": encoded(np.dstack([PLAIN, GREY]), "PNG"),
    "grey and alpha": encoded(Image.fromarray(PLAIN).convert("LA"), "PNG"),
    "palette": encoded(Image.fromarray(PLAIN).convert("P"), "PNG"),
    "one bit": encoded(Image.fromarray(PLAIN).convert("1"), "PNG"),
    "gif": encoded(Image.fromarray(PLAIN).convert("P"), "GIF"),
    "bmp": encoded(PLAIN, "BMP"),
    "webp": encoded(PLAIN, "WEBP", lossless=True),
    "tiff": encoded(PLAIN, "TIFF"),
    "ppm": encoded(PLAIN, "PPM"),
    "jpeg 2000": encoded(PLAIN, "JPEG2000"),
    "one pixel": encoded(PLAIN[:1, :1], "PNG"),
    "one row": encoded(PLAIN[:1], "PNG"),
}


@pytest.mark.parametrize("kind", FILES)
def test_equals_pillow(kind: str) -> None:
    with Image.open(io.BytesIO(FILES[kind])) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    got = decode(FILES[kind])
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= 1  # CMYK is rounded differently


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("image", [GREY, PLAIN], ids=["grey", "colour"])
def test_sixteen_bits_keep_the_upper_eight(image: np.ndarray, ending: str) -> None:
    stored = image[..., ::-1] if image.ndim == 3 else image
    data = cv2.imencode(ending, np.ascontiguousarray(stored).astype(np.uint16) * 256 + 200)[1].tobytes()
    expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    assert np.abs(decode(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text\n", "no image"),
        (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "incomplete"),
        (FILES["png"][: len(FILES["png"]) // 2], "incomplete"),
        (WITH_THUMBNAIL[:-20], "incomplete"),
        (FILES["webp"][:-20], "no image"),
        (FILES["bmp"][:20], "no image"),
    ],
    ids=["empty", "text", "half a jpeg", "half a png", "cut after a thumbnail", "cut webp", "cut bmp"],
)
def test_refused(data: bytes, reason: str, tmp_path) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(data)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert not looks_whole(path)


def test_pixels_of_32_bits() -> None:
    with pytest.raises(Unreadable, match="32 bits"):
        decode(encoded(Image.fromarray(GREY).convert("F"), "TIFF"))


def test_missing_file(tmp_path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_look_so_without_being_decoded(kind: str, tmp_path) -> None:
    (tmp_path / "file").write_bytes(FILES[kind])
    assert looks_whole(tmp_path / "file")
    (tmp_path / "file").write_bytes(FILES[kind] + b"trailing bytes")
    assert looks_whole(tmp_path / "file")


def test_no_file_does_not_look_whole(tmp_path) -> None:
    assert not looks_whole(tmp_path / "none.png")
