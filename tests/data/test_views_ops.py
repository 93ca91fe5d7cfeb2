"""Each operation of both engines against Pillow and torchvision, at the agreement that the engines promise."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from selfsight.datamodules.views import cpu_ops, device_views, image_ops, kernels
from selfsight.datamodules.views.sampling import Parameters, center_box
from selfsight.datamodules.views.view import View

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def photograph(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Smooth light with fine detail, and colours as muted as those of photographs."""
    rng = np.random.default_rng(seed)
    light, colour = np.zeros((height, width, 1)), np.zeros((height, width, 3))
    for step in (2, 4, 8, 16, 32):
        noise = rng.normal(size=(height // step + 2, width // step + 2, 4)).astype(np.float32) * step**1.5
        wide = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        light, colour = light + wide[..., :1] * 0.35, colour + wide[..., 1:] * 0.08
    return np.clip(118 + light + colour, 0, 255).astype(np.uint8)


IMAGE = photograph()
PICTURE = Image.fromarray(IMAGE)


def batch(image: np.ndarray = IMAGE) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def levels(images: Tensor) -> np.ndarray:
    return (images[0].permute(1, 2, 0) * 255).numpy()


def apart(ours: np.ndarray, theirs: object, mean: float, most: float) -> None:
    """Mean and 99th percentile of the distance in grey levels stay within bounds."""
    distance = np.abs(ours.astype(float) - np.asarray(theirs).astype(float))
    assert distance.mean() <= mean, f"mean {distance.mean():.3f}"
    assert np.percentile(distance, 99) <= most, f"99 % {np.percentile(distance, 99):.3f}"


def one(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.73, 1.0, 1.31, 1.8])
def test_brightness_contrast_saturation(factor: float) -> None:
    pillow = [
        function(PICTURE, factor)
        for function in (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
    ]
    apart(cpu_ops.brightness(IMAGE, factor), pillow[0], 0, 0)
    apart(cpu_ops.contrast(IMAGE, factor), pillow[1], 0, 0)
    apart(cpu_ops.saturation(IMAGE, factor), pillow[2], 0.55, 1)
    for kind in range(3):  # floats are not cut to whole levels
        apart(levels(image_ops.adjust(batch(), one(kind), one(factor))), pillow[kind], 0.9, 1.5)


@pytest.mark.parametrize("factor", [0.2, 0.73, 1.8])
def test_device_colours_equal_torchvisions_floats(factor: float) -> None:
    images = batch()
    theirs = [
        reference.adjust_brightness(images, factor),
        reference.adjust_contrast(images, factor),
        reference.adjust_saturation(images, factor),
    ]
    for kind in range(3):  # torchvision's tensors round the weight of red to 0.2989
        torch.testing.assert_close(image_ops.adjust(images, one(kind), one(factor)), theirs[kind], atol=2e-4, rtol=0)


@pytest.mark.parametrize("shift", [-0.5, -0.21, -0.04, 0.0, 0.02, 0.1, 0.33, 0.5])
def test_hue(shift: float) -> None:
    pillow = reference.adjust_hue(PICTURE, shift)
    apart(cpu_ops.hue(IMAGE, shift), pillow, 0.35, 3)
    apart(levels(image_ops.hue(batch(), one(shift))), pillow, 0.5, 3)
    torch.testing.assert_close(
        image_ops.hue(batch(), one(shift)), reference.adjust_hue(batch(), shift), atol=2e-6, rtol=0
    )


def test_hue_of_grey_pixels_does_nothing_and_a_full_turn_neither() -> None:
    grey = torch.rand(2, 1, 5, 5).expand(-1, 3, -1, -1)
    torch.testing.assert_close(image_ops.hue(grey, torch.tensor([0.3, -0.2])), grey)
    torch.testing.assert_close(image_ops.hue(batch(), one(1.0)), batch(), atol=2e-6, rtol=0)


def test_grayscale_and_solarize() -> None:
    apart(cpu_ops.grayscale(IMAGE), reference.rgb_to_grayscale(PICTURE, 3), 0.01, 0)
    apart(levels(image_ops.grayscale(batch(), torch.tensor([True]))), reference.rgb_to_grayscale(PICTURE, 3), 0.3, 0.6)
    for threshold in (0, 100, 128, 256):
        pillow = reference.solarize(PICTURE, threshold)
        apart(cpu_ops.solarize(IMAGE, threshold), pillow, 0, 0)
        apart(levels(image_ops.solarize(batch(), torch.tensor([True]), threshold)).round(), pillow, 0, 0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.2, 2.0])
def test_blur(sigma: float) -> None:
    pillow = PICTURE.filter(ImageFilter.GaussianBlur(sigma))  # rounds to whole levels after each of six passes
    radius = kernels.pillow_radius(2.0)
    apart(cpu_ops.blur(IMAGE, sigma, "pillow", radius), pillow, 0, 0)
    apart(cpu_ops.blur(IMAGE, sigma, "gaussian", 8), pillow, 0.75, 2.5)
    apart(levels(image_ops.blur(batch(), one(sigma), "pillow", radius)), pillow, 0.75, 2.5)
    theirs = reference.gaussian_blur(batch(), [23, 23], [sigma, sigma])
    torch.testing.assert_close(image_ops.blur(batch(), one(sigma), "gaussian", 11), theirs, atol=2e-6, rtol=0)
    apart(cpu_ops.blur(IMAGE, sigma, "gaussian", 11), levels(theirs), 0.3, 1)
    apart(cpu_ops.blur(IMAGE, sigma, "simclr", 11), levels(image_ops.blur(batch(), one(sigma), "simclr", 11)), 0.3, 1)


def test_blur_keeps_a_flat_image_but_for_simclrs_dark_border() -> None:
    flat = torch.full((1, 3, 9, 5), 0.5)
    for kernel in ("gaussian", "pillow"):
        torch.testing.assert_close(image_ops.blur(flat, one(1.7), kernel, 6), flat)
    dark = image_ops.blur(flat, one(1.7), "simclr", 6)
    assert (dark[..., 0, :] < 0.4).all()
    for kernel in ("gaussian", "pillow", "simclr"):
        torch.testing.assert_close(image_ops.blur(batch(), one(0.0), kernel, 6), batch())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 40, 150])
@pytest.mark.parametrize("box", [(10, 20, 60, 70), (0, 0, 96, 128), (5, 7, 9, 110), (40, 50, 12, 12), (3, 4, 1, 1)])
def test_crop_and_resize(box: tuple[int, int, int, int], size: int, interpolation: str) -> None:
    top, left, height, width = box
    pillow = reference.resized_crop(PICTURE, top, left, height, width, [size, size], MODES[interpolation])
    apart(cpu_ops.crop(IMAGE, box, size, interpolation=interpolation), pillow, 0.3, 1)
    edges = (one(float(side)) for side in box)
    on_device = image_ops.crop_resize(batch(), *edges, size, interpolation=interpolation)
    apart(levels(on_device), pillow, 0.4, 1.1)
    floats = reference.resized_crop(
        batch(), top, left, height, width, [size, size], MODES[interpolation], antialias=True
    )
    torch.testing.assert_close(on_device, floats.clamp(0, 1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.6])
@pytest.mark.parametrize("turned", [False, True])
def test_centre(fraction: float, turned: bool) -> None:
    image = photograph(61, 83)
    image = np.ascontiguousarray(image.transpose(1, 0, 2)) if turned else image
    picture = Image.fromarray(image)
    pillow = reference.center_crop(reference.resize(picture, round(32 / fraction)), 32)
    apart(cpu_ops.center(image, 32, fraction, "bilinear"), pillow, 0.1, 1)
    box = center_box(*image.shape[:2], 32, fraction)
    view = View(size=32, crop="center", crop_fraction=fraction)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None]
    apart(levels(device_views.apply(whole, Parameters(*map(one, box)), view)), pillow, 0.3, 1.1)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("place", [(-4, -4), (4, 0), (0, 4), (-1, 3)])
def test_padded_crop(place: tuple[int, int], mode: str) -> None:
    image = photograph(32, 32)
    padded = reference.pad(Image.fromarray(image), [4], padding_mode="constant" if mode == "zeros" else "reflect")
    theirs = reference.crop(padded, place[0] + 4, place[1] + 4, 32, 32)
    np.testing.assert_array_equal(cpu_ops.crop(image, (*place, 32, 32), 32, padding_mode=mode), np.asarray(theirs))
    view = View(size=32, crop="padded", padding=4, padding_mode=mode)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None]
    parameters = Parameters(*map(one, (float(place[0]), float(place[1]), 32.0, 32.0)))
    np.testing.assert_array_equal(levels(device_views.apply(whole, parameters, view)).round(), np.asarray(theirs))


@pytest.mark.parametrize("interpolation", ["bicubic_simclr", "bicubic_simclr_tf1"])
@pytest.mark.parametrize("box", [(3, 5, 70, 60), (10, 10, 20, 25), (0, 0, 96, 20)])
def test_both_engines_resize_as_simclr(interpolation: str, box: tuple[int, int, int, int]) -> None:
    by_cpu = cpu_ops.crop(IMAGE, box, 40, interpolation=interpolation)
    edges = (one(float(side)) for side in box)
    on_device = image_ops.crop_resize(batch(), *edges, 40, interpolation=interpolation)
    apart(by_cpu, levels(on_device).clip(0, 255), 0.35, 1)


@pytest.mark.parametrize("colour", ["simclr", "simclr_v1"])
@pytest.mark.parametrize("factor", [0.3, 0.8, 1.5])
def test_both_engines_colour_as_simclr(colour: str, factor: float) -> None:
    light = cpu_ops.brightness_added(IMAGE, factor - 1) if colour == "simclr_v1" else cpu_ops.brightness(IMAGE, factor)
    by_cpu = [light, cpu_ops.contrast_per_channel(IMAGE, factor), cpu_ops.saturation_hsv(IMAGE, factor)]
    for kind in range(3):
        amount = factor - 1 if colour == "simclr_v1" and kind == 0 else factor
        on_device = image_ops.adjust(batch(), one(kind), one(amount), colour)
        apart(by_cpu[kind], levels(on_device), 0.6, 3)


def test_flips_and_normalisation() -> None:
    images = torch.rand(2, 3, 4, 5)
    turned = image_ops.flip(images, torch.tensor([True, False]), torch.tensor([False, True]))
    torch.testing.assert_close(turned[0], images[0].flip(-1))
    torch.testing.assert_close(turned[1], images[1].flip(-2))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    whole = torch.from_numpy(IMAGE).permute(2, 0, 1)
    theirs = reference.normalize(reference.to_tensor(PICTURE), mean, std)
    torch.testing.assert_close(image_ops.normalize(whole[None], mean, std)[0], theirs)
    for levels in (whole[None], whole.expand(3, -1, -1, -1).contiguous()):
        rows_first = levels.contiguous(memory_format=torch.channels_last)
        normalised = image_ops.normalize(rows_first, mean, std)
        assert torch.equal(normalised, image_ops.normalize(levels.contiguous(), mean, std))
        assert normalised.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(cpu_ops.flip(IMAGE, True, True), IMAGE[::-1, ::-1])
    assert cpu_ops.flip(IMAGE, None, False) is IMAGE


def test_float64_stays_float64() -> None:
    images = batch().double()
    edges = [torch.tensor([side], dtype=torch.float64) for side in (0.0, 0.0, 50.0, 50.0)]
    out = image_ops.crop_resize(images, *edges, 20)
    out = image_ops.colour_jitter(
        out, torch.tensor([[1.2, 0.8, 1.1, 0.1]]).double(), torch.tensor([[0, 1, 2]]), torch.tensor([1])
    )
    out = image_ops.blur(out, torch.tensor([1.0], dtype=torch.float64), "gaussian", 4)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("colour", ["torchvision", "simclr", "simclr_v1"])
def test_quarters_equal_the_general_jitter(colour: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 6, 5, generator=generator)
    factors = 0.5 + torch.rand(8, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 0.4])
    order = torch.rand(8, 3, generator=generator).argsort(-1)
    slots = torch.arange(8) // 2
    torch.testing.assert_close(
        image_ops.colour_jitter_in_quarters(images, factors, order, colour),
        image_ops.colour_jitter(images, factors, order, slots, colour),
    )


def test_enlarged_crops_are_pillows_to_one_level() -> None:
    """Of any size and place, by both engines: Pillow rounds after each side, the device not at all."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width, top, left = (int(n) for n in (*rng.integers(2, 60, 2), *rng.integers(0, 30, 2)))
        image = rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)
        size = int(rng.integers(60, 100))
        part = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(float)
        assert np.abs(cpu_ops.crop(image, (top, left, height, width), size) - expected).max() <= 1
        place = Parameters(*(one(float(side)) for side in (top, left, height, width)), hflip=torch.tensor([False]))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        made = device_views.apply(pixels, place, View(size=size, crop="resized"), torch.float64)
        assert np.abs(levels(made) - expected).max() <= 1.01
