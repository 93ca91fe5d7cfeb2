"""Both engines: the same image for the same parameters, the same distribution for all, boxes that match, odd inputs."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from selfsight.datamodules.views import device_views
from selfsight.datamodules.views.cpu_views import CpuViews, render, rows
from selfsight.datamodules.views.device_views import DeviceViews, apply, make
from selfsight.datamodules.views.policies import POLICIES
from selfsight.datamodules.views.sampling import sample, uniforms
from selfsight.datamodules.views.view import CROPS, View
from selfsight.errors import UserError
from selfsight.nn.boxes import corners
from selfsight.nn.rotate import rotate4

from .test_views_ops import photograph

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RECIPE = View(
    size=24, crop="resized", scale=(0.2, 1.0), hflip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grayscale=0.2,
    blur=0.5, solarize=0.2, cutout=(0.0, 0.5), mean=MEAN, std=STD,
)  # fmt: skip
SIMCLR = View(
    size=24, crop="resized_simclr", interpolation="bicubic_simclr", hflip=0.5, colour="simclr",
    jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grayscale=0.2, blur=0.5, blur_kernel="simclr", blur_taps=5,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, height: int = 30, width: int = 37) -> np.ndarray:
    return np.stack([photograph(height, width, seed) for seed in range(n)])


def channels_first(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("view", "mean", "most"),
    [
        (View(size=24, crop="resized", interpolation="bicubic", hflip=0.5, vflip=0.5), 0.4, 1.2),
        (View(size=24, crop="padded", padding=4, padding_mode="reflect", hflip=0.5), 0.01, 0.01),
        (View(size=24, crop="center", crop_fraction=0.8), 0.4, 1.2),
        (View(size=24, crop="center_simclr", crop_fraction=0.8, interpolation="bicubic_simclr"), 0.4, 1.2),
        (View(size=30, crop="whole", blur=1.0), 0.4, 1.5),
        (View(size=30, crop="whole", blur=1.0, blur_kernel="pillow"), 0.8, 3),
        (View(size=30, crop="whole", jitter=(0.4, 0.4, 0.4, 0.1)), 1.2, 5),
        (View(size=30, crop="whole", jitter=(0.8, 0.8, 0.8, 0.2), colour="simclr"), 1.5, 8),
        (View(size=30, crop="whole", jitter=(0.8, 0.8, 0.8, 0.2), colour="simclr_v1"), 1.5, 8),
        (RECIPE, 1.5, 8),
        (SIMCLR, 1.5, 8),
    ],
    ids=lambda value: f"{value.crop}-{value.interpolation}-{value.colour}" if isinstance(value, View) else "",
)
def test_the_same_parameters_give_the_same_image(view: View, mean: float, most: float) -> None:
    view = replace(view, mean=None, std=None)
    batch = images(16)
    u = uniforms(0, 0, np.arange(16), [0], view.draws)
    by_cpu = np.stack(
        [render(view, image, row) for image, row in zip(batch, rows(sample(view, u, 30, 37)), strict=True)]
    )
    parameters = sample(view, torch.from_numpy(u), 30, 37)
    on_device = apply(channels_first(batch), parameters, view).permute(0, 2, 3, 1).numpy() * 255
    distance = np.abs(by_cpu - on_device.clip(0, 255))
    assert distance.mean() < mean
    assert np.percentile(distance, 99) <= most


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_exact_on_both_engines(policy: str) -> None:
    view = View(size=32, crop="whole", policy=policy, policy_ops=3, cutout=(0.0, 0.5))
    batch = images(32, 32, 32)
    u = uniforms(0, 0, np.arange(32), [0], view.draws)
    by_cpu = np.stack(
        [render(view, image, row) for image, row in zip(batch, rows(sample(view, u, 32, 32)), strict=True)]
    )
    on_device = apply(channels_first(batch), sample(view, torch.from_numpy(u), 32, 32), view)
    distance = np.abs(by_cpu - (on_device.permute(0, 2, 3, 1).numpy() * 255).round())
    # one level where a factor is rounded differently, and whole pixels where a turned one falls on an edge
    assert (distance > 0).mean() < 0.01
    assert distance.mean() < 0.1


def test_a_view_depends_on_the_image_its_number_and_the_epoch_but_not_on_the_batch() -> None:
    blurred = View(size=9, count=2, crop="resized", blur=0.8, blur_per="batch")
    engine, batch = CpuViews([RECIPE, blurred], seed=5), images(6)
    together, boxes = engine.batch(batch, range(6), epoch=3)
    for index in (4, 0, 2):
        views, box = engine(batch[index], index, epoch=3)
        assert len(views) == len(together) == 3
        for k in range(3):
            assert torch.equal(views[k], together[k][index])
            assert torch.equal(box[k], boxes[k][index])
    again, _ = engine.batch(batch[::-1], range(5, -1, -1), epoch=3)
    assert torch.equal(again[0].flip(0), together[0])
    other_epoch, _ = engine.batch(batch, range(6), epoch=4)
    assert not torch.equal(other_epoch[0], together[0])
    other_seed, _ = CpuViews(engine.views, seed=6).batch(batch, range(6), epoch=3)
    assert not torch.equal(other_seed[0], together[0])
    assert not torch.equal(together[1], together[2])


def test_batches_of_many_sizes_go_one_by_one() -> None:
    engine = CpuViews([RECIPE])
    mixed = [photograph(30, 37), photograph(21, 50, 1)]
    together, boxes = engine.batch(mixed, [3, 8], 0)
    assert torch.equal(together[0][1], engine(mixed[1], 8, 0)[0][0])
    assert boxes[0][:, 4:6].tolist() == [[30, 37], [21, 50]]


def test_workers_crop_and_the_device_colours() -> None:
    geometry = View(size=24, crop="resized", scale=(0.2, 1.0), hflip=0.5)
    view = replace(RECIPE, grayscale=0.0, blur=0.0, solarize=0.0, cutout=(0.0, 0.0), jitter_p=0.0)
    batch = images(4)
    cropped, boxes = CpuViews([RECIPE], photometric=False).batch(batch, range(4), 0)
    crop_only, same = CpuViews([geometry]).batch(batch, range(4), 0)
    assert cropped[0].dtype == torch.uint8
    assert torch.equal(cropped[0], crop_only[0])
    assert torch.equal(boxes[0], same[0])
    (left_alone,) = DeviceViews([view]).photometric(cropped, generator())
    mean, std = (torch.tensor(row)[:, None, None] for row in (MEAN, STD))
    torch.testing.assert_close(left_alone, (cropped[0] / 255 - mean) / std)
    (finished,) = DeviceViews([RECIPE]).normalize(cropped)
    torch.testing.assert_close(finished, left_alone)
    (coloured,) = DeviceViews([RECIPE]).photometric(cropped, generator())
    assert (coloured - left_alone).abs().flatten(1).amax(1).gt(0.1).any()


@pytest.mark.parametrize("view", [RECIPE, SIMCLR], ids=["torchvision", "simclr"])
def test_both_engines_draw_from_one_distribution(view: View) -> None:
    """Pixel by pixel, mean and spread of 1,500 views of one image agree; so do shares of dark and light pixels."""
    view = replace(view, size=8)
    image, n = photograph(30, 37, 3), 1500
    engine = DeviceViews([view])
    by_cpu = engine.normalize(CpuViews([view]).batch([image] * n, range(n), 0)[0])[0]
    on_device = engine(channels_first(image[None]).expand(n, -1, -1, -1), generator())[0][0]
    noise = by_cpu.std(0) / n**0.5
    assert ((by_cpu.mean(0) - on_device.mean(0)).abs() / noise).max() < 6  # of 192 differences of two means
    assert (by_cpu.std(0) / on_device.std(0) - 1).abs().max() < 0.12
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantiles = (
            torch.quantile(by_cpu.flatten(1).mean(1), share),
            torch.quantile(on_device.flatten(1).mean(1), share),
        )
        assert abs(quantiles[0] - quantiles[1]) < 0.1 * on_device.flatten(1).mean(1).std() + 0.02


def test_every_image_of_a_batch_draws_for_itself() -> None:
    same = channels_first(images(1)).expand(8, -1, -1, -1)
    out = DeviceViews([RECIPE])(same, generator())[0][0]
    assert len(torch.unique(out.flatten(1), dim=0)) == 8
    again = DeviceViews([RECIPE])(same, generator())[0][0]
    assert torch.equal(out, again)
    assert not torch.equal(out, DeviceViews([RECIPE])(same, generator(1))[0][0])


@pytest.mark.parametrize("engine", ["cpu", "device"])
@pytest.mark.parametrize("crop", ["resized", "resized_simclr", "center", "center_simclr", "whole"])
def test_boxes_say_where_the_pixels_come_from(engine: str, crop: str) -> None:
    """On a ramp, red tells the column and green the row that a pixel's centre shows."""
    height, width, n, size = 40, 60, 24, 10
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 4 * np.arange(width)[None], 4 * np.arange(height)[:, None]
    view = View(size=size, crop=crop, scale=(0.2, 0.6), crop_fraction=0.7, hflip=0.5, vflip=0.5)
    if engine == "cpu":
        (views,), (boxes,) = CpuViews([view]).batch([ramp] * n, range(n), 0)
        pixels = views.float()
    else:
        (views,), (boxes,) = DeviceViews([view])(channels_first(ramp[None]).expand(n, -1, -1, -1), generator())
        pixels = views * 255
    inner = (torch.arange(size) + 0.5) / size
    for picture, (top, left, tall, wide, *whole, hflip, vflip) in zip(pixels, boxes.tolist(), strict=True):
        assert whole == [height, width]
        column = 4 * (left + wide * (inner.flip(0) if hflip else inner) - 0.5)
        row = 4 * (top + tall * (inner.flip(0) if vflip else inner) - 0.5)
        middle = slice(2, -2)  # at the borders the filter is cut off
        assert (picture[0, :, middle] - column[middle]).abs().max() < 2
        assert (picture[1, middle] - row[middle, None]).abs().max() < 2
    assert {tuple(flips) for flips in boxes[:, 6:].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_corners_of_a_whole_image_and_of_its_mirror_image() -> None:
    whole = torch.tensor(
        [[0, 0, 40, 60, 40, 60, 0, 0], [0, 0, 40, 60, 40, 60, 1, 0], [0, 0, 40, 60, 40, 60, 0, 1]]
    ).float()
    assert corners(whole).tolist() == [[0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    pixel = torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0]])
    assert corners(pixel).tolist() == [[0, 0, 0, 0]]


def test_four_rotations() -> None:
    batch = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    turned, labels = rotate4(batch)
    assert labels.tolist() == [0, 1, 2, 3] * 2
    for index, (image, label) in enumerate(zip(turned, labels.tolist(), strict=True)):
        expected = np.rot90(batch[index // 4].numpy(), label, axes=(1, 2))
        assert (image.numpy() == expected).all()
    with pytest.raises(UserError, match="4x5"):
        rotate4(torch.zeros(1, 3, 4, 5))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (3, 2), (19, 23), (7, 300)])
def test_tiny_and_odd_images_keep_a_flat_colour(crop: str, height: int, width: int) -> None:
    view = View(size=13, crop=crop, padding=2, padding_mode="reflect", crop_fraction=0.9, hflip=0.5, blur=1.0)
    flat = np.full((2, height, width, 3), (10, 120, 240), np.uint8)
    for batch in (flat, flat[:1]):
        (by_cpu,), _ = CpuViews([view]).batch(batch, range(len(batch)), 0)
        (on_device,), _ = DeviceViews([view])(channels_first(batch), generator())
        assert by_cpu.shape == on_device.shape == (len(batch), 3, 13, 13)
        expected = torch.tensor([10.0, 120.0, 240.0])[:, None, None].expand(len(batch), 3, 13, 13)
        torch.testing.assert_close(by_cpu.float(), expected, atol=1, rtol=0)
        torch.testing.assert_close(on_device * 255, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("view", [RECIPE, SIMCLR, View(size=5, policy="fixmatch", crop="padded", padding=1)])
def test_every_operation_survives_one_pixel(view: View) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (3, 1, 1, 3), dtype=np.uint8)
    for size in (1, 2):
        tiny = replace(view, size=size)
        assert CpuViews([tiny]).batch(batch, range(3), 0)[0][0].shape == (3, 3, size, size)
        assert DeviceViews([tiny])(channels_first(batch), generator())[0][0].isfinite().all()


def test_huge_and_grey_images() -> None:
    huge = np.zeros((1, 6000, 5000, 3), np.uint8)
    huge[:, :, 2500:] = 255
    view = View(size=16, crop="resized", scale=(0.9, 1.0))
    (made,), _ = CpuViews([view]).batch(huge, [0], 0)
    assert made[0, :, :, 0].max() == 0
    assert made[0, :, :, -1].min() == 255
    grey = photograph()[..., :1]
    colour = np.repeat(grey, 3, axis=2)
    engine = CpuViews([RECIPE])
    for image in (grey, grey[..., 0]):
        assert torch.equal(engine(image, 0, 0)[0][0], engine(colour, 0, 0)[0][0])


def test_other_inputs_are_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="float32"):
        CpuViews([RECIPE])(np.zeros((4, 4, 3), np.float32), 0, 0)
    with pytest.raises(UserError, match="4x4x4"):
        CpuViews([RECIPE])(np.zeros((4, 4, 4), np.uint8), 0, 0)
    with pytest.raises(UserError, match="float32"):
        DeviceViews([RECIPE])(torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match="1 views were given where the description makes 2"):
        DeviceViews([RECIPE, RECIPE]).photometric([torch.zeros(1, 3, 24, 24, dtype=torch.uint8)])


def test_a_view_is_one_graph() -> None:
    view = replace(RECIPE, policy="usb", policy_ops=1, size=6)
    batch, u = channels_first(images(5, 8, 9)), torch.rand(8, view.draws, generator=generator())
    function = functools.partial(make, view=view, dtype=torch.float32, cropped=False)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(batch, u), function(batch, u))


@pytest.mark.slow
def test_compiled_views_equal_plain_ones() -> None:
    view = replace(RECIPE, size=8)
    batch = channels_first(images(5, 10, 11))
    plain, boxes = DeviceViews([view])(batch, generator())
    compiled, same = DeviceViews([view], compile=True)(batch, generator())
    torch.testing.assert_close(compiled[0], plain[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(boxes, same)


def test_a_failing_compiler_is_told_once_and_gone_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def fails(*_: object) -> object:
            raise RuntimeError("no C++ compiler\nand much more")

        return fails

    monkeypatch.setattr(device_views.torch, "compile", broken)
    engine, batch = DeviceViews([RECIPE], compile=True), channels_first(images(2))
    with pytest.warns(UserWarning, match="run uncompiled: no C\\+\\+ compiler") as told:
        out = engine(batch, generator())[0][0]
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(batch, generator())
    assert torch.equal(out, DeviceViews([RECIPE])(batch, generator())[0][0])


def test_half_precision_views_stay_close() -> None:
    view = replace(RECIPE, solarize=0.0)
    batch = channels_first(images(8))
    exact = DeviceViews([view])(batch, generator())[0][0]
    half = DeviceViews([view], dtype=torch.bfloat16)(batch, generator())[0][0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.03
