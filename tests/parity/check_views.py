"""Views: crops, colours, blur, resampling and policies against the authors' and Pillow's numbers."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.views import cpu_ops, device_views, image_ops, policy_ops, sampling
from selfsight.datamodules.views.policies import POLICIES, Pool
from selfsight.datamodules.views.view import View
from selfsight.nn.boxes import corners
from selfsight.nn.rotate import rotate, rotate4

from .harness import Case, family

LEVEL = 1.5 / 255  # one grey level, in the harness' measure, with room for the recorded maximum below 255


def pixels(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(np.uint8))


# --- SimCLR -----------------------------------------------------------------------------------------------------------


@family("simclrv2", "color_brightness", "color_contrast", "color_saturation", "color_hue")
def colours(case: Case) -> None:
    factors = case.tensor("factors")
    images = case.tensor("image").expand(len(factors), -1, -1, -1)
    kinds = ["brightness", "contrast", "saturation", "hue"]
    kind = next(k for k, name in enumerate(kinds) if case.name.startswith(f"color_{name}"))
    if kind == 3:
        got = image_ops.hue(images, factors)
    else:
        got = image_ops.adjust(images, torch.full_like(factors, kind), factors, "simclr")
    case.compare("image", got, 1e-5)


@family("simclrv2", "color_grayscale")
def grey(case: Case) -> None:
    got = image_ops.grayscale(case.tensor("image")[None], torch.tensor([True]), "simclr")[0]
    case.compare("image", got.clamp(0, 1), 1e-5)


@family("simclrv2", "color_jitter_fixed_order", "color_jitter_orders")
def jitter(case: Case) -> None:
    orders = case.tensor("order") if "order" in case.inp else torch.arange(4)[None]
    factors = torch.tensor([[case.number(k) for k in ("brightness", "contrast", "saturation", "hue")]]).double()
    images = case.tensor("image").expand(len(orders), -1, -1, -1)
    rest, slot = split_order(orders)
    got = image_ops.colour_jitter(images, factors.expand(len(orders), 4), rest, slot, "simclr")
    case.compare("image", got if "order" in case.inp else got[0], 1e-5)
    for row in range(4):  # the engine's way: the hue once an image, rows grouped by its place
        rows = (slot == row).nonzero()[:, 0][:1]
        if len(rows):
            group = torch.full((4,), int(rows))
            quarters = image_ops.colour_jitter_in_quarters(images[group], factors.expand(4, 4), rest[group], "simclr")
            torch.testing.assert_close(quarters[row], got[int(rows)], rtol=0, atol=1e-12)


def split_order(orders: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of four operations ``[N, 4]`` as the order of the first three and the number of them before the hue."""
    slot = (orders == 3).long().argmax(1)
    rest = torch.stack([order[order != 3] for order in orders])
    return rest, slot


@family("simclrv2", "blur_")
def simclr_blur(case: Case) -> None:
    radius = int(case.number("kernel_size_arg") / 2)
    assert 2 * radius + 1 == case.number("taps")
    sigma = torch.tensor([case.number("sigma")], dtype=torch.float64)
    case.compare("image", image_ops.blur(case.tensor("image")[None], sigma, "simclr", radius)[0], 1e-5)


@family("simclrv2", "batch_blur")
def batch_blur(case: Case) -> None:
    size = case.number("image_size")
    view = View(size=size, blur=case.number("probability"), blur_kernel="simclr", blur_per="batch")
    images = case.tensor("image")
    u = torch.zeros(len(images), view.draws, dtype=torch.float64)
    u[:, view.columns["blur"].start] = case.tensor("uniform")
    u[:, view.columns["sigma"].start] = (case.number("sigma") - 0.1) / 1.9
    sigma = sampling.sample(view, u, *images.shape[-2:]).sigma
    case.compare("image", image_ops.blur(images, sigma, "simclr", view.blur_radius).clamp(0, 1), 1e-5)


@family("simclrv2", "bicubic_tf1_", "bicubic_tf2_")
def bicubic(case: Case) -> None:
    image = case.tensor("image")
    case.compare("image", resized(image, (0, 0, *image.shape[-2:]), case), 1e-5)


def simclr_interpolation(case: Case) -> str:
    return "bicubic_simclr_tf1" if "_tf1_" in case.name else "bicubic_simclr"


def resized(image: Tensor, box: tuple[float, ...], case: Case) -> Tensor:
    edges = [torch.tensor([side], dtype=torch.float32) for side in box]
    return image_ops.crop_resize(image[None], *edges, case.number("size"), interpolation=simclr_interpolation(case))[0]


@family("simclrv2", "eval_preprocess_tf1_", "eval_preprocess_tf2_")
def simclr_evaluation(case: Case) -> None:
    image = case.tensor("image")
    box = sampling.center_box_simclr(*image.shape[-2:], case.number("crop_proportion"))
    case.compare("image", resized(image, box, case).clamp(0, 1), 1e-5)


@family("simclrv2", "view_tf1_", "view_tf2_")
def simclr_view(case: Case) -> None:
    image = torch.from_numpy(pixels(case.inp["image_uint8"]))[None]
    rest, slot = split_order(case.tensor("order")[None])
    jittered = bool(case.number("jitter"))
    factors = [case.number(k) for k in ("brightness", "contrast", "saturation", "hue")]
    view = View(
        size=case.number("size"),
        crop="resized_simclr",
        interpolation=simclr_interpolation(case),
        jitter=(0.8, 0.8, 0.8, 0.2) if jittered else (0, 0, 0, 0),
        colour="simclr",
    )
    parameters = sampling.Parameters(
        *(torch.tensor([side], dtype=torch.float32) for side in case.inp["crop_yxhw"].tolist()),
        hflip=torch.tensor([bool(case.number("flip"))]),
        factors=torch.tensor([factors], dtype=torch.float64) if jittered else None,
        order=rest if jittered else None,
        hue_slot=slot if jittered else None,
        grayscale=torch.tensor([bool(case.number("grayscale"))]),
    )
    got = device_views.apply(image, parameters, view, torch.float64)[0]
    case.compare("image", got, 1e-5)


@family("simclrv2", "crop_stats_", slow=True)
def simclr_crop_distribution(case: Case) -> None:
    height, width, samples = case.number("height"), case.number("width"), 100_000
    view = View(size=32, crop="resized_simclr")
    u = sampling.uniforms(1, 0, np.arange(samples), [0], view.draws)
    top, left, tall, wide = (edge.astype(np.float64) for edge in sampling.crop_box(view, u, height, width))
    area, aspect = tall * wide / (height * width), wide / tall
    grid = case.inp["area_grid"][:, None], case.inp["aspect_grid"][:, None]
    case.compare("area_cdf", (area <= grid[0]).mean(1), 0.01)
    case.compare("aspect_cdf", (aspect <= grid[1]).mean(1), 0.01)
    case.compare("area_mean", area.mean(), 0.01)
    case.compare("area_min", area.min(), 0.01)
    case.compare("height_mean", tall.mean(), 0.01)
    case.compare("width_mean", wide.mean(), 0.01)
    whole = (tall == height) & (wide == width)
    case.compare("full_image_fraction", whole.mean(), 0.01)
    room = height - tall
    case.compare("offset_y_rel_mean", (top[room > 0] / room[room > 0]).mean(), 0.01)
    last_row, last_column = (top == room) & (room > 0), (left == width - wide) & (wide < width)
    case.compare("last_row_offset_count", last_row.sum(), 0)
    case.compare("last_col_offset_count", last_column.sum(), 0)


# --- SwAV, PixPro -----------------------------------------------------------------------------------------------------


@family("swav", "pil_blur")
def swav_blur(case: Case) -> None:
    image = pixels(case.inp["image"])
    got = [cpu_ops.blur(image, float(radius), "pillow", 0) for radius in case.inp["radius"]]
    case.compare("image", np.stack(got), 0)


@family("pixpro", "crop_coord")
def pixpro_corners(case: Case) -> None:
    top, left, tall, wide, height, width = case.tensor("i_j_h_w_H_W").float().unbind(1)
    boxes = torch.stack([top, left, tall, wide, height, width, *case.tensor("hflip_vflip").float().unbind(1)], 1)
    case.compare("coord", corners(boxes), 1e-7)


@family("pixpro", "crop_sample")
def pixpro_sampler(case: Case) -> None:
    scale = case.number("scale_min"), case.number("scale_max")
    ratio = case.number("ratio_min"), case.number("ratio_max")
    got = []
    for seed, (height, width) in zip(case.inp["seed"].tolist(), case.inp["H_W"].tolist(), strict=True):
        u = authors_draws(random.Random(seed), height, width, scale, ratio)
        box = sampling.resized_crop(*u, height, width, scale=scale, ratio=ratio)
        got.append([int(edge[0]) for edge in box])
    case.compare("i_j_h_w", np.array(got), 0)


def authors_draws(
    generator: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the authors' calls of Python's generator draw, as uniform numbers: areas, aspects, and the place."""
    areas, aspects, place = [], [], [0.0, 0.0]
    for _ in range(10):
        areas.append(generator.random())
        aspects.append(generator.random())
        pixels = (scale[0] + (scale[1] - scale[0]) * areas[-1]) * height * width
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * aspects[-1])
        wide, tall = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            place = [(generator.randint(0, room) + 0.5) / (room + 1) for room in (height - tall, width - wide)]
            break
    return np.array([areas]), np.array([aspects]), np.array([place])


@family("pixpro", "cropimg_")
def pixpro_crop(case: Case) -> None:
    image, box = pixels(case.inp["image"]), case.inp["i_j_h_w"].tolist()
    flip = bool(case.number("hflip"))
    got = cpu_ops.crop(image, box, case.number("size"), hflip=flip)
    case.compare("image", got, LEVEL)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    parameters = sampling.Parameters(*(torch.tensor([float(side)]) for side in box), hflip=torch.tensor([flip]))
    on_device = device_views.apply(batch, parameters, View(size=case.number("size"), crop="resized"), torch.float64)
    case.compare("image", on_device[0].permute(1, 2, 0) * 255, LEVEL)
    edges = sampling.boxes(parameters, *image.shape[:2])
    case.compare("coord", corners(edges)[0], 1e-7)


@family("pixpro", "blur_solarize_")
def pixpro_blur(case: Case) -> None:
    image, sigma = pixels(case.inp["image"]), case.number("sigma")
    case.compare("blurred", cpu_ops.blur(image, sigma, "pillow", 0), 0)
    view = View(size=len(image), blur=1.0, blur_kernel="pillow", blur_sigma=(sigma, sigma))
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    on_device = image_ops.blur(batch, torch.tensor([sigma], dtype=torch.float64), "pillow", view.blur_radius)
    case.compare("blurred", on_device[0].permute(1, 2, 0) * 255, 3 / 255)
    threshold = case.number("solarize_threshold")
    case.compare("solarized", cpu_ops.solarize(image, threshold), 0)
    inverted = image_ops.solarize(batch, torch.tensor([True]), threshold)[0].permute(1, 2, 0)
    case.compare("solarized", (inverted * 255).round(), 0)


# --- semi-supervised policies -----------------------------------------------------------------------------------------


@family("simmatchv2", "image_ops_simmatchv2")
def simmatch_images(case: Case) -> None:
    image = case.inp["image"]
    case.compare("solarize128", cpu_ops.solarize(image, 128), 0)
    blurred = [cpu_ops.blur(image, float(radius), "pillow", 0) for radius in case.inp["blur_radius"]]
    case.compare("gaussian_blur", np.stack(blurred), 0)


def by_both_engines(
    case: Case, output: str, image: np.ndarray, operations: list[list[int]], values: list[list[float]]
) -> None:
    """Policies applied to copies of one image by Pillow and on a batch: the same pixels."""
    made = []
    for row, amounts in zip(operations, values, strict=True):
        one = image
        for operation, value in zip(row, amounts, strict=True):
            one = cpu_ops.operate(one, operation, value)
        made.append(one)
    expected = case.out[output]
    case.compare(output, np.stack(made) if expected.ndim == 4 else made[0], 0)
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(len(made), -1, -1, -1).float() / 255
    on_device = policy_ops.apply_policy(batch, torch.tensor(operations), torch.tensor(values))
    on_device = (on_device * 255).round().permute(0, 2, 3, 1)
    case.compare(output, on_device if expected.ndim == 4 else on_device[0], 0)


def final(pool: Pool, name: str, level: float, negative: bool, size: int) -> tuple[int, float]:
    pick = next(k for k, entry in enumerate(pool.entries) if entry.name == name)
    row = np.array([[pick]], dtype=np.float64)
    operation, value = pool.values(row, row * 0 + level, row < 0 if not negative else row >= 0, size)
    return int(operation[0, 0]), float(value[0, 0])


def pool_of(name: str) -> Pool:
    pool = POLICIES[name]
    assert isinstance(pool, Pool)
    return pool


def side(image: np.ndarray, name: str) -> int:
    return image.shape[0] if name == "TranslateY" else image.shape[1]


@family("simmatchv2", "randaug_simmatch_ops")
def simmatch_operations(case: Case) -> None:
    image = case.inp["image"]
    pools = {"fixmatch": pool_of("fixmatch"), "imagenet": pool_of("simmatch_imagenet")}
    for output in case.out:
        family_name, name, level, *sign = output.split("_")
        operation, value = final(
            pools[family_name], name, int(level.removeprefix("v")) / 10, sign == ["neg"], side(image, name)
        )
        by_both_engines(case, output, image, [[operation]], [[value]])


@family("simmatchv2", "randaug_usb_ops")
def usb_operations(case: Case) -> None:
    image, pool = case.inp["image"], pool_of("usb")
    for name in case.out:
        entry = next(e for e in pool.entries if e.name == name)
        span = entry.high - entry.low
        levels = [(value - entry.low) / span if span else 0.0 for value in case.inp[f"val_{name}"].tolist()]
        drawn = [final(pool, name, level, False, side(image, name)) for level in levels]
        by_both_engines(case, name, image, [[op] for op, _ in drawn], [[value] for _, value in drawn])


@family("simmatchv2", "cutout_usb")
def usb_cutout(case: Case) -> None:
    image = case.inp["image"]
    np.random.seed(int(case.inp["np_seed"]))
    made = [
        image if share <= 0 else cut(image, share * image.shape[1], *usb_centre(image), (125, 123, 114))
        for share in case.inp["val"].tolist()
    ]
    case.compare("images", np.stack(made), 0)


def usb_centre(image: np.ndarray) -> tuple[float, float]:
    height, width = image.shape[:2]
    x = np.random.uniform(width)  # the authors' call: from the width down to 1
    return x, np.random.uniform(height)


def cut(image: np.ndarray, length: float, x: float, y: float, fill: tuple[int, int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    u = np.array([[length / width, y / height, x / width]])
    square = sampling.cutout_square(u, (0.0, 1.0), height, width)
    made = cpu_ops.cutout(image, square[0].tolist(), fill)
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double() / 255
    on_device = (image_ops.cutout(batch, torch.from_numpy(square), fill) * 255).round()[0].permute(1, 2, 0)
    assert (on_device.numpy() == made).all()
    return made


@family("simmatchv2", "randaug_mc_", "randaug_imagenet_", "randaug_usb_")
def policies(case: Case) -> None:
    """Whole policies, with the authors' draws in the authors' order."""
    image, made = case.inp["image"], []
    prefix, ops, magnitude = case.name.split("_")[1:4]
    count, top = int(ops.removeprefix("n")), int(magnitude.removeprefix("m"))
    pool = pool_of({"mc": "fixmatch", "imagenet": "simmatch_imagenet", "usb": "usb"}[prefix])
    for seed in case.inp["seeds"].tolist():
        random.seed(seed)
        np.random.seed(seed)
        one = image
        for entry in random.choices(pool.entries, k=count):
            if prefix == "usb":
                level, applied, negative = random.random(), True, False
            else:
                level = np.random.randint(1, top) / 10
                applied = prefix == "imagenet" or random.random() < 0.5
                negative = applied and entry.signed and random.random() < 0.5
            if applied:
                one = cpu_ops.operate(one, *final(pool, entry.name, level, negative, side(image, entry.name)))
        if prefix == "usb":
            share = random.random() * 0.5
            one = cut(one, share * image.shape[1], *usb_centre(image), (125, 123, 114))
        elif prefix == "mc":
            x, y = np.random.uniform(0, image.shape[1]), np.random.uniform(0, image.shape[0])
            one = cut(one, 16, x, y, (127, 127, 127))
        made.append(one)
    case.compare("images", np.stack(made), 0)


# --- rotation ---------------------------------------------------------------------------------------------------------


@family("rotation", "rotate_hwc_")
def rotations(case: Case) -> None:
    image = torch.from_numpy(case.inp["image"]).permute(2, 0, 1)
    for turns in range(4):
        case.compare(f"rot{90 * turns}", rotate(image, turns).permute(1, 2, 0), 0)


def rotated_batch(case: Case, indices: Tensor) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(pixels(case.inp["images_uint8"])).permute(0, 3, 1, 2)
    return rotate4(image_ops.normalize(images, case.number("mean"), case.number("std"))[indices])


@family("rotation", "batch_")
def rotated(case: Case) -> None:
    x, labels = rotated_batch(case, torch.arange(len(case.inp["images_uint8"])))
    case.compare("x", x, 1e-6)
    case.compare("labels", labels, 0)


@family("rotation", "batch_epoch_size_wraps_")
def rotated_epoch(case: Case) -> None:
    order = torch.arange(case.number("epoch_size")) % len(case.inp["images_uint8"])
    batches = [rotated_batch(case, chunk) for chunk in order.split(case.number("batch_size"))]
    case.compare("x", torch.cat([x for x, _ in batches]), 1e-6)
    case.compare("labels", torch.cat([labels for _, labels in batches]), 0)
    case.compare("batch_rows", [len(x) for x, _ in batches], 0)


@family("rotation", "flip_after_rotation")
def flip_after(case: Case) -> None:
    image = torch.from_numpy(case.inp["image"]).permute(2, 0, 1)[None]
    mirrored = torch.tensor([True])
    case.compare("hflip_of_rot90", image_ops.flip(rotate(image, 1), mirrored)[0].permute(1, 2, 0), 0)
    case.compare("rot270_of_hflip", rotate(image_ops.flip(image, mirrored), 3)[0].permute(1, 2, 0), 0)
