"""The description of a view: what it accepts, what it refuses, and the recipes shipped with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import selfsight.conf
from selfsight.datamodules.views.cpu_views import CpuViews
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.view import View, expand
from selfsight.engine.inherit import fill_views
from selfsight.errors import UserError

RECIPES = sorted((Path(selfsight.conf.__path__[0]) / "views").glob("*.yaml"))


def recipe(path: Path, size: int) -> list[View]:
    data = {"image_size": size, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    cfg = OmegaConf.create({"dataset": data, "views": OmegaConf.load(path)})
    fill_views(cfg, OmegaConf.create({}))  # as the jobs fill what a recipe leaves open
    return [instantiate(node) for name, node in cfg.views.items() if name != "engine"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 0.5}, "image_size"),
        ({"count": 0}, "count=0"),
        ({"crop": "resizd"}, "Did you mean 'resized'"),
        ({"interpolation": "nearest"}, "interpolation=nearest is unknown"),
        ({"colour": "simclr2"}, "Did you mean 'simclr'"),
        ({"policy": "fixmach"}, "Did you mean 'fixmatch'"),
        ({"scale": (0.5, 0.2)}, "scale=[0.5, 0.2]"),
        ({"scale": (0.0, 1.0)}, "scale=[0.0, 1.0]"),
        ({"scale": 0.2}, "scale=0.2 has to be a list of 2 numbers"),
        ({"ratio": (0, 1)}, "ratio=[0, 1]"),
        ({"hflip": 1.5}, "hflip=1.5"),
        ({"blur": float("nan")}, "blur=nan"),
        ({"jitter": (0.4, 0.4, 0.4)}, "4 numbers"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue"),
        ({"jitter": (0.4, -0.1, 0.4, 0.1)}, "at least 0"),
        ({"jitter": (0.4, 1.2, 0.4, 0.1), "colour": "simclr"}, "colour is simclr"),
        ({"blur_taps": 4}, "odd"),
        ({"blur_sigma": (0, 1)}, "blur_sigma"),
        ({"mean": (0.5, 0.5, 0.5)}, "both or neither"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.1, 0.0, 0.1)}, "std=[0.1, 0.0, 0.1]"),
        ({"policy": "fixmatch", "policy_magnitude": 11}, "policy_magnitude is 11"),
        ({"policy": "randaugment", "policy_magnitude": 31}, "policy_magnitude is 31"),
        ({"cutout": (0.5, 0.2)}, "cutout"),
        ({"cutout": None}, "cutout"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        View(**{"size": 32, **wrong})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_view_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        expand([])
    with pytest.raises(UserError, match="at least one"):
        CpuViews([])


def test_shares_become_pixels_once() -> None:
    local = View(size=0.4286, image_size=224, crop="padded", padding=0.125)
    assert (local.size, local.padding) == (96, 12)
    assert replace(local, count=3).size == 96
    assert View(size=64, image_size=224).size == 64


def test_lists_of_a_configuration_become_tuples_and_views_stay_hashable() -> None:
    view = View(size=8, scale=[0.2, 1.0], mean=[0.5] * 3, std=[0.2] * 3)  # type: ignore[arg-type]
    assert view.scale == (0.2, 1.0)
    assert {view: 1}[replace(view)] == 1


def test_default_blur_reaches_what_matters_of_its_widest_sigma() -> None:
    assert View(size=224, blur=0.5, blur_kernel="simclr").taps == 23
    assert View(size=32, blur=0.5, blur_kernel="simclr").taps == 3
    assert View(size=32, blur=0.5, blur_sigma=(0.1, 2.0)).taps == 17
    assert View(size=32, blur=0.5, blur_kernel="pillow", blur_sigma=(0.1, 2.0)).blur_radius == 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_makes_its_views_on_both_engines(path: Path) -> None:
    views = recipe(path, 20)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 28, 3), dtype=np.uint8)
    by_cpu, cpu_boxes = CpuViews(views).batch(images, range(3), 0)
    on_device, boxes = DeviceViews(views)(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.Generator().manual_seed(0)
    )
    sizes = [view.size for view in expand(views)]
    assert sizes == sorted(sizes, reverse=True), "global views come first"
    for made, size in [*zip(by_cpu, sizes, strict=True), *zip(on_device, sizes, strict=True)]:
        assert made.shape == (3, 3, size, size)
    assert all(box.shape == (3, 8) for box in [*cpu_boxes, *boxes])


def test_there_are_recipes_for_all_methods() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "simclr", "simclr_small", "swav", "pixpro", "supcon", "rotation", "spark", "simmatchv2", "fixmatch", "finetune",
        "supervised_cifar", "digits",
    }  # fmt: skip


def test_swav_cuts_two_views_of_224_and_six_of_96() -> None:
    views = recipe(next(path for path in RECIPES if path.stem == "swav"), 224)
    assert [(view.size, view.count, view.scale) for view in views] == [(224, 2, (0.14, 1.0)), (96, 6, (0.05, 0.14))]


def test_simmatchv2_has_the_five_strong_sizes_of_its_authors() -> None:
    views = recipe(next(path for path in RECIPES if path.stem == "simmatchv2"), 224)
    assert [view.size for view in views] == [224, 224, 224, 192, 160, 120, 96]
