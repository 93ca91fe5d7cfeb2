"""DICOM files, written by pydicom: their values, windows, and what is wrong with them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from selfsight import cli
from selfsight.datamodules import folder
from selfsight.datamodules.images.bands import Kind, kind_of_bytes, kind_of_file, read_bands
from selfsight.datamodules.images.decode import read_image
from selfsight.datamodules.images.dicom import read
from selfsight.datamodules.images.formats import Unreadable
from selfsight.errors import UserError

RNG = np.random.default_rng(0)
MANY = 10**6


def dicom(
    pixels: np.ndarray | None, *, photometric: str = "MONOCHROME2", bits: int | None = None, **tags: object
) -> bytes:
    """A file of ``[H, W]`` or ``[H, W, 3]``; None: of no pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    if pixels is not None:
        made.Rows, made.Columns = pixels.shape[:2]
        made.SamplesPerPixel, made.PhotometricInterpretation = (3 if pixels.ndim == 3 else 1), photometric
        if pixels.ndim == 3:
            made.PlanarConfiguration = 0
        made.BitsAllocated = 8 * pixels.dtype.itemsize
        made.BitsStored = bits or made.BitsAllocated
        made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
        made.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(made, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, made, enforce_file_format=True)
    return file.getvalue()


def test_stored_values_come_out(tmp_path: Path) -> None:
    for dtype in ("uint16", "int16"):
        limits = np.iinfo(dtype)
        pixels = RNG.integers(limits.min, limits.max + 1, (5, 7)).astype(dtype)
        (tmp_path / "one").write_bytes(dicom(pixels))
        image = read_bands(tmp_path / "one")
        assert image.dtype == dtype
        np.testing.assert_array_equal(image[..., 0], pixels)
        assert kind_of_file(tmp_path / "one") == Kind(1, dtype)


def test_white_is_large_in_both_interpretations() -> None:
    pixels = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    one, other = (
        read(dicom(p, photometric=f"MONOCHROME{n}", bits=12), MANY) for n, p in ((2, pixels), (1, 4095 - pixels))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescaled_values_are_in_the_units_of_the_modality(photometric: str) -> None:
    pixels = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    content = dicom(pixels, photometric=photometric, bits=12, RescaleSlope=2, RescaleIntercept=-1024)
    assert kind_of_bytes(content) == Kind(1, "float32")
    stored = 4095 - pixels.astype(int) if photometric == "MONOCHROME1" else pixels.astype(int)
    np.testing.assert_array_equal(read(content, MANY)[..., 0], stored * 2 - 1024)


def test_windows_are_the_standards() -> None:
    """The formula of PS3.3 C.11.2.1.2.1 with outputs from 0 to 1."""
    x = np.arange(0, 200, dtype=np.int16).reshape(10, 20)
    c, w = 100.0, 51.0
    flat = x.astype(float)
    expected = np.where(
        flat <= c - 0.5 - (w - 1) / 2, 0, np.where(flat > c - 0.5 + (w - 1) / 2, 1, (flat - (c - 0.5)) / (w - 1) + 0.5)
    )
    np.testing.assert_allclose(read(dicom(x), MANY, (c, w))[..., 0], expected, atol=1e-6)
    stated = dicom(x, WindowCenter=[c, 1], WindowWidth=[w, 2])
    np.testing.assert_allclose(read(stated, MANY, "auto")[..., 0], expected, atol=1e-6)
    inverted = read(dicom(x, photometric="MONOCHROME1"), MANY, (c, w))[..., 0]
    np.testing.assert_allclose(inverted, 1 - expected, atol=1e-6)
    exact = read(dicom(x, WindowCenter=c, WindowWidth=w, VOILUTFunction="LINEAR_EXACT"), MANY, "auto")[..., 0]
    np.testing.assert_allclose(exact, np.clip((flat - c) / w + 0.5, 0, 1), atol=1e-6)
    with pytest.raises(Unreadable, match="states no window"):
        read(dicom(x), MANY, "auto")


def test_colours_and_eight_bits_are_rgb(tmp_path: Path) -> None:
    colours = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    grey = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
    for name, content in (("colour", dicom(colours, photometric="RGB")), ("grey", dicom(grey))):
        (tmp_path / name).write_bytes(content)
        assert kind_of_file(tmp_path / name) is None
    np.testing.assert_array_equal(read_image(tmp_path / "colour"), colours)
    np.testing.assert_array_equal(read_image(tmp_path / "grey"), np.repeat(grey[..., None], 3, axis=2))
    (tmp_path / "deep").write_bytes(dicom((grey.astype(np.uint16) << 4) + 5, bits=12))
    np.testing.assert_allclose(
        read_image(tmp_path / "deep")[..., 0], grey, atol=1
    )  # 255 is 4095, 254.7 what is written


def test_what_is_wrong_is_said() -> None:
    pixels = np.zeros((4, 4), np.uint16)
    for content, reason in (
        (dicom(None), "a DICOM file without pixel data"),
        (dicom(pixels, NumberOfFrames=2), "a DICOM file of 2 frames"),
        (dicom(pixels)[:-9], "incomplete pixel data"),
        (dicom(pixels)[:150], "a DICOM file without pixel data|a damaged DICOM file"),
    ):
        with pytest.raises(Unreadable, match=reason):
            read(content, MANY)
    with pytest.raises(Unreadable, match=r"too many pixels: 4 x 4"):
        read(dicom(pixels), 15)
    squeezed = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    squeezed.file_meta.TransferSyntaxUID = JPEG2000Lossless
    squeezed.PixelData = pydicom.encaps.encapsulate([b"no picture"])
    squeezed["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    pydicom.dcmwrite(file, squeezed)
    with pytest.raises(Unreadable, match=r"damaged or compressed as JPEG 2000.*: pip install pylibjpeg"):
        read(file.getvalue(), MANY)


def scans(root: Path) -> Path:
    """Two classes of scans without endings, as scanners write them, and a report without pixels."""
    for c, name in enumerate(("ill", "well")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = RNG.integers(900 + 300 * c, 1000 + 300 * c, (20, 20)).astype(np.int16)
            (root / name / f"IM{i:04}").write_bytes(dicom(pixels, RescaleSlope=1, RescaleIntercept=-1024))
    return root


def test_a_folder_of_scans(tmp_path: Path) -> None:
    root = scans(tmp_path / "scans")
    (root / "ill/report").write_bytes(dicom(None))
    data = folder(root, max_unreadable=0.1, test_fraction=0)
    assert data.bands is not None
    assert data.bands.kind == Kind(1, "float32")
    assert -130 < data.bands.low < data.bands.high < 280
    assert data.classes == ("ill", "well")
    assert dict(data.unreadable.kinds()) == {"a DICOM file without pixel data": 1}
    windowed = folder(root, max_unreadable=0.1, test_fraction=0, window=[80, 400])
    assert windowed.bands is not None
    assert 0 <= windowed.bands.low < windowed.bands.high <= 1
    with pytest.raises(UserError, match=r"dataset.window is 5; null, auto, or a list of the centre and the width"):
        folder(root, window=5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dataset.window is for the grey values of DICOM"):
        folder(root, window=[80, 400], channels="rgb")


def test_a_run_on_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scans(tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    words = [
        "recipe=digits/simclrv2",
        "dataset=folder",
        "dataset.root=scans",
        "dataset.window=[80,400]",
        "dataset.image_size=16",
    ]
    plain = ["views.global.jitter=[0.4,0.4,0,0]", "views.global.grayscale=0", "backbone.width=4", "batch_size=8"]
    cli.main(["pretrain", *words, *plain, "num_workers=0", "trainer.max_epochs=1", "report=false", "name=run"])
    capsys.readouterr()
    cli.main(["knn", "run=runs/run"])
    assert "knn_top1" in capsys.readouterr().out
