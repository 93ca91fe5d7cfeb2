"""Images of any channels and type: what the file holds comes out, and views, networks and pictures follow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch

from selfsight import cli
from selfsight.datamodules import ImageData, ImageDataModule, folder
from selfsight.datamodules.images.bands import Bands, Kind, kind_of_bytes, kind_of_file, read_bands, scaled
from selfsight.datamodules.images.formats import Unreadable
from selfsight.datamodules.views import band_views
from selfsight.datamodules.views.band_views import CpuBandViews, DeviceBandViews
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError
from selfsight.jobs.stats import told_sizes
from selfsight.reporting.thumbnails import visible

RNG = np.random.default_rng(0)


def noise(dtype: str, channels: int, side: int = 12, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 1, (side, side + 2, channels))
    if dtype == "float32":
        return values.astype(np.float32)
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, values.shape).astype(dtype)


def save(path: Path, image: np.ndarray, **options: object) -> Path:
    """By the ending of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    squeezed = image[..., 0] if image.shape[2] == 1 else image
    if path.suffix == ".npy":
        np.save(path, squeezed)
    elif path.suffix == ".npz":
        np.savez(path, image=squeezed)
    elif path.suffix == ".png":
        cv2.imwrite(str(path), squeezed if squeezed.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]])
    else:
        many = {"photometric": "minisblack", "planarconfig": "contig"} if image.shape[2] > 1 else {}
        tifffile.imwrite(path, squeezed, **(many | options))
    return path


# --- what the file holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "channels"),
    [
        ("a.png", "uint16", 1), ("a.png", "uint16", 3), ("a.png", "uint16", 4), ("a.npy", "float32", 5),
        ("a.npy", "int16", 1), ("a.npz", "uint16", 2), ("a.tif", "uint16", 4), ("a.tif", "int16", 2),
        ("a.tif", "float32", 6), ("a.tif", "uint8", 5),
    ],
)  # fmt: skip
def test_every_value_comes_out(tmp_path: Path, name: str, dtype: str, channels: int) -> None:
    image = noise(dtype, channels)
    path = save(tmp_path / name, image)
    read = read_bands(path)
    assert read.dtype == image.dtype
    assert np.array_equal(read, image)
    assert kind_of_file(path) == kind_of_bytes(path.read_bytes()) == Kind(channels, dtype)


def test_tiff_pages_and_planes_are_channels(tmp_path: Path) -> None:
    image = noise("uint16", 4)
    planes = np.moveaxis(image, -1, 0)
    options: dict[str, dict[str, object]] = {
        "pages": {"photometric": "minisblack"},
        "planar": {"photometric": "minisblack", "planarconfig": "separate"},
        "big": {"photometric": "minisblack", "planarconfig": "separate", "bigtiff": True, "byteorder": ">"},
        "deflated": {"photometric": "minisblack", "compression": "zlib", "predictor": True},
    }
    for name, how in options.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", planes, **how)  # type: ignore[arg-type]
        assert np.array_equal(read_bands(tmp_path / f"{name}.tif"), image), name
        assert kind_of_file(tmp_path / f"{name}.tif") == Kind(4, "uint16"), name


def test_colour_images_of_eight_bits_are_no_bands(tmp_path: Path) -> None:
    """Alpha, grey and palettes neither: they are read as ever."""
    image = noise("uint8", 4)
    paths = [
        save(tmp_path / "rgba.png", image),
        save(tmp_path / "grey.png", image[..., :1]),
        save(tmp_path / "rgb.tif", image[..., :3], photometric="rgb"),
        save(tmp_path / "rgba.tif", image, photometric="rgb", extrasamples=["unassalpha"]),
        save(tmp_path / "grey.tif", image[..., :1]),
    ]
    cv2.imwrite(str(tmp_path / "photo.jpg"), image[..., :3])
    for path in [*paths, tmp_path / "photo.jpg"]:
        assert kind_of_file(path) is None, path


def test_what_cannot_be_meant_is_unreadable(tmp_path: Path) -> None:
    bad = {
        "cut.tif": save(tmp_path / "whole.tif", noise("uint16", 4)).read_bytes()[:400],
        "cut.png": save(tmp_path / "whole.png", noise("uint16", 1)).read_bytes()[:300],
        "cut.npy": save(tmp_path / "whole.npy", noise("uint16", 4)).read_bytes()[:200],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Unreadable):
            read_bands(tmp_path / name)
    np.save(tmp_path / "nan.npy", np.full((4, 4, 2), np.nan, np.float32))
    np.save(tmp_path / "long.npy", np.zeros((4, 4, 2), np.int64))
    np.save(tmp_path / "flat.npy", np.zeros(4, np.float32))
    for name, words in {"nan": "no numbers", "long": "pixels of int64", "flat": "1 dimensions"}.items():
        with pytest.raises(Unreadable, match=words):
            read_bands(tmp_path / f"{name}.npy")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve TIFF files of two classes that differ in the fourth channel alone."""
    root = tmp_path_factory.mktemp("bands") / "fields"
    for i in range(12):
        image = np.random.default_rng(0).integers(0, 60_000, (16, 16, 4)).astype(np.uint16)
        image[..., 3] = np.random.default_rng(i).integers(0, 20, (16, 16)) + (900 if i % 2 else 500)
        save(root / "ab"[i % 2] / f"{i}.tif", image)
    return root


def test_facts_are_computed(four_bands: Path) -> None:
    data = folder(four_bands, image_size=16, test_fraction=0)
    images = np.stack([scaled(data.train.read(i)) for i in range(12)]).astype(np.float64)
    assert data.bands is not None
    assert data.bands.kind == Kind(4, "uint16")
    assert data.channels == 4
    np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(data.std, images.std((0, 1, 2)), rtol=1e-5)
    assert (data.bands.low, data.bands.high) == (round(images.min() * 65535), round(images.max() * 65535))
    assert folder(four_bands, mean=[0.1] * 4, std=[0.2] * 4).mean == (0.1,) * 4
    with pytest.raises(UserError, match=r"dataset.mean .* a list of 4 numbers, for the 4 channels"):
        folder(four_bands, mean=[0.1] * 3, std=[0.2] * 3)


def test_channels_are_chosen(four_bands: Path) -> None:
    whole = folder(four_bands, test_fraction=0)
    for chosen, places in {2: [0, 1], (4, 2): [3, 1]}.items():
        data = folder(four_bands, channels=chosen if isinstance(chosen, int) else list(chosen), test_fraction=0)
        assert np.array_equal(data.train.read(3), whole.train.read(3)[..., places])
        assert data.mean == tuple(whole.mean[place] for place in places)
    with pytest.raises(UserError, match=r"dataset.channels is \[5\].* 4 channels of uint16"):
        folder(four_bands, channels=[5])
    with pytest.raises(UserError, match=r"dataset.channels"):
        folder(four_bands, channels=0)


@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
def test_the_low_byte_counts(tmp_path: Path, kind: str) -> None:
    """A pair of images that differ in it alone differ as tensors, in training and in evaluation."""
    first = noise("uint16", 3, side=8)[:, :8]
    second = first.copy()
    second[2, 3, 1] ^= 1
    for name, image in {"a": first, "b": second}.items():
        save(tmp_path / f"{name}.{kind}", image)
    data = folder(tmp_path, image_size=8, labels="none", test_fraction=0)
    module = ImageDataModule(data, [View(8, crop="whole")], batch_size=2, num_workers=0)
    x = next(iter(module.eval_dataloader("train"))).views[0]
    assert torch.equal((x[0] != x[1]).nonzero(), torch.tensor([[1, 2, 3]]))
    trained = next(iter(module.train_dataloader())).views[0]
    assert (trained[0] != trained[1]).sum() == 1


def test_mixed_kinds_are_counted_and_named(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.tif", noise("uint16", 4))
    save(tmp_path / "odd.npy", noise("float32", 2))
    save(tmp_path / "photo.png", noise("uint8", 3))
    words = (
        r"3 of 4 channels of uint16 \(such as '0.tif'\), 1 of 2 channels of float32 \(such as 'odd.npy'\), "
        r"1 of 8-bit colour \(such as 'photo.png'\)"
    )
    with pytest.raises(UserError, match=words):
        folder(tmp_path)


def test_sixteen_bits_as_rgb_where_that_is_asked_for(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", noise("uint16", 3, seed=i))
    assert folder(tmp_path).channels == 3
    assert folder(tmp_path).train.read(0).dtype == np.uint16
    data = folder(tmp_path, channels="rgb")
    assert data.bands is None
    assert np.array_equal(data.train.read(0), folder(tmp_path).train.read(0) >> 8)


# --- views -----------------------------------------------------------------------------------------------------------


def dim(tmp_path: Path, count: int = 8) -> ImageData:
    """Images of two channels of 16 bits with mean 0.02 and std 0.01."""
    for i in range(count):
        values = np.random.default_rng(i).normal(0.02, 0.01, (24, 24, 2)).clip(0.001, 1)
        save(tmp_path / f"{i}.npy", np.rint(values * 65535).astype(np.uint16))
    return folder(tmp_path, image_size=24, labels="none", test_fraction=0)


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_photometry_comes_before_standardisation(tmp_path: Path, engine: str) -> None:
    """Brightness multiplies and contrast spreads what the sensor gave; the result has the scale of the data."""
    data = dim(tmp_path)
    plain = View(24, crop="whole")

    def made(view: View) -> torch.Tensor:
        module = ImageDataModule(data, [view], batch_size=8, num_workers=0, engine=engine, seed=1)
        batch = next(iter(module.train_dataloader()))
        return batch.views[0][batch.indices.argsort()]

    x = made(plain)
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-2
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    values = x * std + mean
    brighter = made(replace(plain, jitter=(0.5, 0, 0, 0))) * std + mean
    factors = (brighter / values).flatten(1)
    assert float((factors - factors.median(1, keepdim=True).values).abs().max()) < 1e-2
    assert float(factors.std(0).mean()) > 0.1
    spread = made(replace(plain, jitter=(0, 0.5, 0, 0))) * std + mean
    torch.testing.assert_close(spread.mean((2, 3)), values.mean((2, 3)), rtol=1e-4, atol=1e-6)
    assert float((spread.std((2, 3)) / values.std((2, 3))).std()) > 0.1


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_gain_noise_and_dropping_are_of_each_channel(tmp_path: Path, engine: str) -> None:
    data = dim(tmp_path)

    def made(**what: float) -> torch.Tensor:
        view = View(24, crop="whole", **what)  # type: ignore[arg-type]
        module = ImageDataModule(data, [view], batch_size=8, num_workers=0, engine=engine, seed=1)
        batch = next(iter(module.train_dataloader()))
        return batch.views[0][batch.indices.argsort()]

    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    x = made()
    gained = ((made(gain=0.5) * std + mean) / (x * std + mean)).flatten(2).median(2).values
    assert float((gained[:, 0] - gained[:, 1]).abs().mean()) > 0.05
    assert 0.5 <= float(gained.min()) <= float(gained.max()) <= 1.5
    difference = made(noise=0.2) - x
    assert abs(float(difference.std()) - 0.2) < 0.02
    dropped = made(drop=0.9).flatten(2).abs().amax(2) < 1e-5
    assert dropped.any()
    assert not dropped.all(1).any()


def test_engines_crop_alike(tmp_path: Path) -> None:
    """The same parameters give the same geometry, whether an image is cut first or resampled as a whole."""
    data = dim(tmp_path)
    assert data.bands is not None
    view = View(16, crop="resized", hflip=0.5, mean=tuple(data.mean), std=tuple(data.std))
    image = data.train.read(0)
    cpu = CpuBandViews([view], data.bands, seed=3)
    (out,), boxes = cpu(image, 5, 0)
    top, left, height, width = (int(v) for v in boxes[0, :4])
    cut = torch.from_numpy(scaled(image))[top : top + height, left : left + width].permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(cut, (16, 16), mode="bilinear", antialias=True)[0]
    resized = resized.flip(-1) if boxes[0, 6] else resized
    torch.testing.assert_close(out, resized, rtol=1e-4, atol=1e-6)
    device = DeviceBandViews([view], data.bands)
    (views_,), (drawn,) = device(torch.from_numpy(image).permute(2, 0, 1)[None], torch.Generator().manual_seed(0))
    assert views_.shape == (1, 2, 16, 16)
    assert drawn.shape == (1, 8)


def test_what_is_for_rgb_is_refused_by_name() -> None:
    bands = Bands(Kind(5, "uint16"), 0, 4000, (0.1,) * 5, (0.1,) * 5, 9)
    with pytest.raises(UserError) as error:
        band_views.check({"global": View(8, jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, solarize=0.1)}, bands)
    told = str(error.value)
    assert "views.global asks for saturation, hue, grayscale, solarize" in told
    assert "5 channels of uint16" in told
    assert "views.global.jitter=[0.4,0.4,0,0] views.global.grayscale=0 views.global.solarize=0" in told
    assert "dataset.channels=[3,2,1]" in told
    with pytest.raises(UserError, match="the policy"):
        band_views.check({"strong": View(8, policy="randaugment")}, replace(bands, kind=Kind(3, "uint16")))
    band_views.check({"global": View(8, jitter=(0.4, 0.4, 0.2, 0.1))}, replace(bands, kind=Kind(3, "uint16")))


def test_pictures_are_stretched() -> None:
    """Eight-bit RGB stays; a dim band of others uses the whole range, whatever its neighbours do."""
    rgb = noise("uint8", 3)
    assert visible(rgb) is rgb
    shown = visible((noise("uint16", 5) // 100 + 300).astype(np.uint16))
    assert shown.dtype == np.uint8
    assert shown.shape[2] == 3
    assert (shown.min(), shown.max()) == (0, 255)
    assert visible(noise("float32", 2)).shape[2] == 3


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_on_four_bands(
    four_bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has four channels, and the fourth tells the classes apart; the export and a reload know it."""
    monkeypatch.chdir(tmp_path)
    words = [
        "dataset=folder", f"dataset.root={four_bands}", "dataset.image_size=16", "dataset.test_fraction=0.4",
        "dataset.split=draw", "backbone=resnet_digits", "batch_size=4", "trainer.max_epochs=1",
        "trainer.accelerator=cpu", "evaluator.final.knn.k=1", "~evaluator.final.few_shot",
        "~evaluator.final.diagnostics", "name=run",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "method=simclrv2", *words])
    assert "views.global.grayscale=0" in capsys.readouterr().err
    cli.main(["pretrain", "method=simclrv2", *words, "views.global.jitter=[0.4,0.4,0,0]", "views.global.grayscale=0"])
    told = capsys.readouterr().out
    assert "4 channels of uint16" in told
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["pretrained"]["knn_top1"] == 1.0
    assert "each picture stretched" in (tmp_path / "runs" / "run" / "report.html").read_text()
    spec = json.loads((tmp_path / "runs" / "run" / "backbone.json").read_text())
    assert spec["backbone"]["in_chans"] == 4
    assert len(spec["mean"]) == 4
    cli.main(["knn", "run=runs/run", "evaluator.k=1"])
    assert "knn_top1     1.0000" in capsys.readouterr().out


def test_stats_are_what_a_run_uses(four_bands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed words give the data set that `auto` gives."""
    cli.main(["stats", f"dataset.root={four_bands}", "dataset.test_fraction=0"])
    told = capsys.readouterr().out
    assert "4 channels of uint16" in told
    words = {key: told.split(f"dataset.{key}=[")[1].split("]")[0] for key in ("mean", "std")}
    given = {key: [float(value) for value in word.split(",")] for key, word in words.items()}
    data = folder(four_bands, test_fraction=0)
    np.testing.assert_allclose(given["mean"], data.mean, rtol=1e-5)
    np.testing.assert_allclose(given["std"], data.std, rtol=1e-5)
    cli.main(["stats", "dataset=digits"])
    told = capsys.readouterr().out
    assert "3 channels of uint8, 0 to 255; of 1,437 images" in told
    assert "width × height: 16 × 16" in told


def test_sizes_that_differ_are_told_by_the_least_the_middle_and_the_most() -> None:
    assert told_sizes([(8, 4), (100, 50), (10, 20)]) == "from 8 × 4 to 100 × 50, in the middle 10 × 20"
