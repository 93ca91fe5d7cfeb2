"""The draw of parameters: the right distributions, alike in both libraries, a function of (seed, epoch, index)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, LEVEL_TO_ARG, NAME_TO_OP
from torchvision.transforms import ColorJitter, RandomCrop, RandomResizedCrop

from selfsight.datamodules.views import image_ops
from selfsight.datamodules.views.cpu_ops import operate
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.policies import OPERATIONS, POLICIES
from selfsight.datamodules.views.sampling import Parameters, crop_box, sample, uniforms
from selfsight.datamodules.views.view import View

N = 20_000
FULL = View(
    size=32,
    crop="resized",
    hflip=0.5,
    vflip=0.1,
    jitter=(0.4, 0.3, 0.2, 0.1),
    jitter_p=0.8,
    grayscale=0.2,
    blur=0.5,
    solarize=0.3,
    policy="fixmatch",
    cutout=(0.1, 0.5),
)


def draw(view: View, n: int = N, height: int = 40, width: int = 50, seed: int = 0) -> Parameters:
    return sample(view, uniforms(seed, 0, np.arange(n), [0], view.draws), height, width)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples; 0.02 is reached by chance once in a thousand for 20,000 each."""
    grid = np.sort(np.concatenate([a, b]))
    share_a, share_b = (np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b))
    return float(np.abs(share_a - share_b).max())


@pytest.mark.parametrize(("height", "width"), [(40, 50), (300, 100), (32, 32)])
def test_crops_follow_torchvision(height: int, width: int) -> None:
    view = View(size=32, crop="resized", scale=(0.2, 0.9), ratio=(0.7, 1.5))
    box = crop_box(view, uniforms(0, 0, np.arange(N), [0], view.draws), height, width)
    top, left, tall, wide = (edge.astype(np.float64) for edge in box)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 0.9], [0.7, 1.5]) for _ in range(4000)], dtype=float)
    for ours, reference in zip((top, left, tall, wide), theirs.T, strict=True):
        assert gap(ours, reference) < 0.035  # chance for 20,000 against 4,000: below 0.034 in 999 of 1,000
    assert gap(tall * wide, theirs[:, 2] * theirs[:, 3]) < 0.035
    assert gap(wide / tall, theirs[:, 3] / theirs[:, 2]) < 0.035


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 7)])
def test_where_no_crop_fits_it_is_torchvisions_centre(height: int, width: int) -> None:
    view = View(size=32, crop="resized", scale=(0.9, 1.0))
    box = crop_box(view, uniforms(0, 0, np.arange(50), [0], view.draws), height, width)
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    for ours, reference in zip(box, theirs, strict=True):
        assert (ours == reference).all()


@pytest.mark.parametrize("crop", ["resized", "resized_simclr", "padded"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 400), (400, 5), (33, 31), (20_000, 15_000)])
def test_every_crop_lies_in_its_image(crop: str, height: int, width: int) -> None:
    view = View(size=32, crop=crop, padding=4)
    pad = view.padding if crop == "padded" else 0
    top, left, tall, wide = crop_box(view, uniforms(0, 0, np.arange(500), [0], view.draws), height, width)
    assert (tall >= 1).all()
    assert (wide >= 1).all()
    if crop != "padded" or min(height, width) >= view.size:
        assert (top >= -pad).all()
        assert (left >= -pad).all()
        assert (top + tall <= height + pad).all()
        assert (left + wide <= width + pad).all()


def test_padded_crops_follow_torchvision() -> None:
    view = View(size=32, crop="padded", padding=4)
    top, left, *_ = crop_box(view, uniforms(0, 0, np.arange(N), [0], view.draws), 32, 32)
    theirs = np.array([RandomCrop.get_params(torch.empty(3, 40, 40), (32, 32))[:2] for _ in range(4000)]) - 4
    assert set(np.unique(top)) == set(range(-4, 5)) == set(np.unique(left))
    assert gap(top, theirs[:, 0]) < 0.035


def test_numpy_and_torch_draw_the_same_parameters() -> None:
    for view in (
        FULL,
        View(size=32, crop="resized_simclr", colour="simclr", jitter=(0.8, 0.8, 0.8, 0.2), policy="usb"),
    ):
        u = uniforms(3, 1, np.arange(500), [0], view.draws)
        for name, ours, theirs in zip(
            Parameters._fields, sample(view, u, 40, 50), sample(view, torch.from_numpy(u), 40, 50), strict=True
        ):
            if ours is not None:
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_rates_of_the_coins() -> None:
    p = draw(FULL)
    for drawn, rate in ((p.hflip, 0.5), (p.vflip, 0.1), (p.grayscale, 0.2), (p.sigma > 0, 0.5), (p.solarize, 0.3)):
        assert abs(drawn.mean() - rate) < 0.015  # four standard deviations of a fair coin


def test_jitter_factors_follow_torchvision() -> None:
    p = draw(FULL)
    applied = (p.factors != np.array([1, 1, 1, 0])).any(1)
    assert abs(applied.mean() - 0.8) < 0.012
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.3, 0.2, 0.1)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [ColorJitter.get_params(*ranges)[1:] for _ in range(4000)]
    for kind in range(4):
        assert gap(p.factors[applied, kind], np.array([float(row[kind]) for row in theirs])) < 0.035
    stronger = draw(View(size=8, jitter=(1.5, 0.0, 0.0, 0.0)))
    assert stronger.factors[:, 0].min() >= 0


def test_all_24_orders_are_equally_likely() -> None:
    p = draw(FULL)
    whole = [tuple(np.insert(order, int(slot), 3)) for order, slot in zip(p.order, p.hue_slot, strict=True)]
    _, counts = np.unique(whole, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts / N - 1 / 24).max() < 0.006


def test_a_fixed_order_is_brightness_contrast_saturation_hue() -> None:
    p = draw(View(size=8, jitter=(0.4, 0.4, 0.4, 0.1), jitter_order="fixed"), 10)
    assert (p.order == np.arange(3)).all()
    assert (p.hue_slot == 3).all()


def test_sigma_is_uniform_per_image_or_one_for_the_batch() -> None:
    p = draw(View(size=8, blur=1.0, blur_sigma=(0.1, 2.0)))
    assert gap(p.sigma, np.linspace(0.1, 2.0, N)) < 0.02
    one = draw(View(size=8, blur=0.5, blur_per="batch"), 100)
    assert len(np.unique(one.sigma[one.sigma > 0])) == 1
    assert 30 < (one.sigma > 0).sum() < 70


@pytest.mark.parametrize("name", POLICIES)
def test_policies_draw_their_operations_within_range(name: str) -> None:
    p = draw(View(size=32, policy=name, policy_ops=2))
    drawn = {OPERATIONS[int(k)] for k in np.unique(p.operations)}
    by_name = {OPERATIONS[k]: p.values[p.operations == k] for k in np.unique(p.operations).astype(int)}
    assert len(drawn) >= 9
    assert np.abs(by_name["Rotate"]).max() <= 135
    assert by_name["Rotate"].min() < 0 < by_name["Rotate"].max()
    assert set(np.unique(by_name["Posterize"])) <= set(range(0 if name == "randaugment_timm" else 2, 9))
    assert (by_name["Color"] > 0).all()
    if name in ("fixmatch", "simmatch_imagenet"):
        assert set(np.unique(np.abs(by_name["Rotate"])).round(4)) == {3.0 * level for level in range(1, 10)}
        assert (by_name["TranslateX"] == by_name["TranslateX"].round()).all() if "TranslateX" in by_name else True


def test_fixmatch_applies_half_of_its_operations() -> None:
    p = draw(View(size=32, policy="fixmatch", policy_ops=2))
    left_alone = (p.operations == 0).mean()
    assert abs(left_alone - (0.5 + 0.5 / 14)) < 0.012


TIMMS = {  # names of timm's operations, where they differ beyond the end
    "Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing", "LiftDark": "SolarizeAdd",
    **{name: f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    "TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("magnitude", [5, 9])
def test_timms_randaugment_is_timms(magnitude: int) -> None:
    """Names, strengths and images of its operations; what they move is filled black, by the nearest neighbour."""
    p = draw(View(size=32, policy="randaugment_timm", policy_ops=2, policy_magnitude=magnitude))
    assert abs((p.operations == 0).mean() - 0.5) < 0.012
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    drawn = {OPERATIONS[int(k)]: int(k) for k in np.unique(p.operations) if k}
    assert {TIMMS.get(name, name) for name in drawn} == set(_RAND_INCREASING_TRANSFORMS)
    for name, number in drawn.items():
        level, act = LEVEL_TO_ARG[TIMMS.get(name, name)], NAME_TO_OP[TIMMS.get(name, name)]
        ours = [operate(image, number, value) for value in np.unique(p.values[p.operations == number])]
        theirs = []
        for _ in range(20):  # signs are drawn inside
            arguments = () if level is None else level(magnitude, {})
            made = act(Image.fromarray(image), *arguments, resample=Image.Resampling.NEAREST, fillcolor=None)
            theirs.append(np.asarray(made))
        assert len(ours) == len({made.tobytes() for made in theirs}), name
        for mine in ours:  # a factor may be rounded otherwise
            assert min(np.abs(mine.astype(int) - made).mean() for made in theirs) < 0.05, name


def test_cutout_squares_have_their_side_and_a_uniform_centre() -> None:
    p = draw(View(size=32, cutout=(0.5, 0.5)))
    top, bottom = p.cutout.T[:2]
    assert top.min() == 0
    assert bottom.max() == 32
    inner = (top > 0) & (bottom < 32)
    assert (bottom - top)[inner].max() == (bottom - top)[inner].min() == 16
    assert abs(((top + bottom) / 2)[inner].mean() - 16) < 0.15
    none = draw(View(size=32, cutout=(0.0, 1e-12)), 10)
    assert (none.cutout[:, 1] <= none.cutout[:, 0]).all()


def test_numbers_depend_on_seed_epoch_index_and_view_alone() -> None:
    whole = uniforms(1, 2, np.arange(10), [3], 50)
    np.testing.assert_array_equal(uniforms(1, 2, [7], [3], 50)[0], whole[7])
    np.testing.assert_array_equal(uniforms(1, 2, [7, 2], [3], 20), whole[[7, 2], :20])
    others = [
        uniforms(*key, 50)
        for key in ((0, 2, [7], [3]), (1, 3, [7], [3]), (1, 2, [8], [3]), (1, 2, [7], [4]), (2, 1, [7], [3]))
    ]
    for other in others:
        assert abs(np.corrcoef(other[0], whole[7])[0, 1]) < 0.6
        assert not np.intersect1d(other, whole[7]).size
    assert uniforms(-1, 0, [0], [0], 4).shape == (1, 4)
    assert uniforms(2**63, 0, [2**40], [0], 4).shape == (1, 4)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = uniforms(0, 0, np.arange(N), [0], 40)
    assert u.min() >= 0
    assert u.max() < 1
    assert max(gap(column, np.linspace(0, 1, N)) for column in u.T[:10]) < 0.02
    across = np.corrcoef(u.T) - np.eye(40)
    along = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert max(np.abs(across).max(), abs(along)) < 0.035


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_the_device_gives_every_image_of_any_batch_each_place_of_the_hue(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_ops, "adjust", lambda images, *_: images / 2)
    monkeypatch.setattr(image_ops, "hue", lambda images, _: images + 1)
    view = View(size=1, crop="whole", jitter=(0.4, 0.4, 0.4, 0.1))
    images, generator, rounds = torch.zeros(batch, 3, 1, 1, dtype=torch.uint8), torch.Generator().manual_seed(0), 400
    engine = DeviceViews([view])
    halved = torch.stack([engine(images, generator)[0][0][:, 0, 0, 0] for _ in range(rounds)])  # 2 ** (slot - 3)
    slots = 3 + halved.log2()
    for slot in range(4):
        assert ((slots == slot).float().mean(0) - 0.25).abs().max() < 0.085  # four standard deviations


def test_flips_and_crops_of_the_device_follow_the_same_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(4000, 3, 10, 12, dtype=torch.uint8)
    view = View(size=4, crop="resized", hflip=0.5)
    box = DeviceViews([view])(images, generator)[1][0].numpy()
    by_cpu = crop_box(view, uniforms(0, 0, np.arange(N), [0], view.draws), 10, 12)
    for column in range(4):
        assert gap(box[:, column], by_cpu[column]) < 0.035
    assert abs(box[:, 6].mean() - 0.5) < 0.03
    assert (box[:, 4:6] == [10, 12]).all()
    assert (box[:, 7] == 0).all()
