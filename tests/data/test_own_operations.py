"""An operation of one's own is a step of a view on the CPU: by a draw of each image's own, or one sentence."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the index for a newer version of itself

import albumentations
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torchvision.transforms import v2

from selfsight.contracts import Batch
from selfsight.datamodules.views.cpu_views import CpuViews
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError

from .test_module import LOOK, in_files, in_memory, module, same
from .writers import picture

SIZE = 10
WHOLE = View(SIZE, crop="whole")


def shift(image: np.ndarray) -> np.ndarray:
    """As many grey levels as the three generators say, each a channel."""
    levels = [random.randrange(200), np.random.randint(200), int(torch.randint(200, ()))]
    return np.broadcast_to(np.array(levels, np.uint8), image.shape).copy()


def turned(image: np.ndarray) -> np.ndarray:
    return image[::-1].copy()


def with_steps(*transforms: Callable[..., Any], **changes: Any) -> View:
    return View(SIZE, crop="whole", transforms=transforms, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("many", [False, True], ids=["image", "batch"])
def test_steps_come_last_and_in_their_order(many: bool) -> None:
    image = picture(0, SIZE, SIZE)
    steps = (turned, v2.RandomHorizontalFlip(p=1.0), albumentations.InvertImg(p=1.0))
    views = CpuViews([with_steps(*steps, solarize=1.0, solarize_threshold=0)])
    made = views.batch([image], [0], 0)[0][0][0] if many else views(image, 0, 0)[0][0]
    expected = 255 - (255 - image)[::-1, ::-1]
    assert np.array_equal(made.permute(1, 2, 0).numpy(), expected)


def test_one_transform_needs_no_list() -> None:
    chain = v2.Compose([v2.RandomInvert(p=1.0), v2.RandomVerticalFlip(p=1.0)])
    view = View(SIZE, crop="whole", transforms=torch.nn.Sequential(chain))  # type: ignore[arg-type]
    image = picture(0, SIZE, SIZE)
    made = CpuViews([view])(image, 0, 0)[0][0]
    assert np.array_equal(made.permute(1, 2, 0).numpy(), 255 - image[::-1])


@pytest.mark.parametrize(
    "transform", [shift, v2.ColorJitter(0.8, 0.8), albumentations.GaussNoise(std_range=(0.1, 0.3), p=1.0)]
)
def test_draws_depend_on_seed_epoch_image_and_view(transform: Callable[..., Any]) -> None:
    view, images = with_steps(transform, count=2), [picture(i, SIZE, SIZE) for i in range(3)]
    first, again = (CpuViews([view], seed=1).batch(images, [0, 1, 2], 0)[0] for _ in range(2))
    alone = [CpuViews([view], seed=1)(image, i, 0)[0] for i, image in enumerate(images)]
    for v in range(2):
        assert torch.equal(first[v], again[v])
        assert torch.equal(first[v], torch.stack([made[v] for made in alone]))
    assert not torch.equal(first[0], first[1])
    same_image = CpuViews([view], seed=1).batch([images[0]] * 3, [0, 1, 2], 0)[0]
    assert not torch.equal(same_image[0][0], same_image[0][1])
    for other in (
        CpuViews([view], seed=2).batch(images, [0, 1, 2], 0),
        CpuViews([view], 1).batch(images, [0, 1, 2], 1),
    ):
        assert not torch.equal(first[0], other[0][0])


def test_the_generators_of_the_training_are_left_alone() -> None:
    draws = []
    for transforms in ((), (shift,)):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        CpuViews([with_steps(*transforms)])(picture(0, SIZE, SIZE), 0, 0)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_workers_change_nothing(tmp_path: Path) -> None:
    data = in_files(tmp_path)
    views = [View(8, crop="resized", count=2, transforms=(shift,), **LOOK)]
    here, there = (list(module(data, views, num_workers=n).train_dataloader()) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    batch: Batch = here[0]
    assert len(batch.views[0].flatten(1).unique(dim=0)) == len(batch)


def test_auto_is_the_cpu() -> None:
    data = in_memory(8)
    made = module(data, [with_steps(turned, **LOOK)], engine="auto", batch_size=8)
    assert module(data, [WHOLE], engine="auto", batch_size=8).engine == "device", "tiny images"
    assert made.engine == "cpu"
    (batch,) = made.train_dataloader()
    (plain,) = module(data, [View(SIZE, crop="whole", **LOOK)], batch_size=8).train_dataloader()
    assert torch.equal(batch.views[0], plain.views[0].flip(2))


def test_the_device_refuses_them() -> None:
    view = with_steps(turned)
    with pytest.raises(UserError, match=r"transforms of your own, .* set views.engine=cpu \(or auto\)"):
        module(in_memory(), [view], engine="device")
    for call in (DeviceViews([view]), DeviceViews([view]).photometric):
        with pytest.raises(UserError, match="transforms of your own"):
            call(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda image: image[:4], "<lambda> gave 4x10x3 uint8 and an image of 10x10x3 uint8 was expected"),
        (lambda image: image / 255, "gave 10x10x3 float64"),
        (lambda image: None, "gave a NoneType"),
        (v2.ToDtype(torch.float32, scale=True), "ToDtype gave 10x10x3 float32"),
        (v2.Resize(5), "Resize gave 5x5x3 uint8"),
        (albumentations.Normalize(), "Normalize gave 10x10x3 float32"),
    ],
)
def test_what_is_no_image(transform: Callable[..., Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        CpuViews([with_steps(transform)])(picture(0, SIZE, SIZE), 0, 0)
    assert said in str(refused.value)


def test_what_cannot_be_called() -> None:
    with pytest.raises(UserError, match=r"View: transforms=\['blur'\] has to be a list of functions"):
        View(SIZE, transforms=("blur",))  # type: ignore[arg-type]


def test_from_a_configuration() -> None:
    node = {
        "_target_": "selfsight.datamodules.views.View", "size": SIZE, "crop": "whole",
        "transforms": [{"_target_": "torchvision.transforms.v2.RandomInvert", "p": 1.0}],
    }  # fmt: skip
    image = picture(0, SIZE, SIZE)
    made = CpuViews([instantiate(node, _convert_="all")])(image, 0, 0)[0][0]
    assert np.array_equal(made.permute(1, 2, 0).numpy(), 255 - image)
