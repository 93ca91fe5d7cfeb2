"""The draw of a view's random parameters: uniform numbers in, parameters out, the same code for both engines.

The CPU engine hands in numpy rows made from (seed, epoch, index) by `uniforms`; the device engine hands in a torch
tensor from its generator. Every row is drawn on its own, and nothing here depends on values drawn for other rows
(except a blur sigma that a view wants once per batch).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from selfsight.datamodules.views.arrays import Array, arange, constant, namespace
from selfsight.datamodules.views.policies import POLICIES
from selfsight.datamodules.views.view import View

#: factors that change nothing
NEUTRAL = {
    "torchvision": (1.0, 1.0, 1.0, 0.0),
    "simclr": (1.0, 1.0, 1.0, 0.0),
    "simclr_v1": (0.0, 1.0, 1.0, 0.0),
}


class Parameters(NamedTuple):
    """What was drawn for ``N`` views, in arrays with leading dimension ``N``; None where a view has no such operation.

    Attributes:
        top, left, height, width: the crop in source pixels (fractional only for ``crop='center'``).
        hflip, vflip: bool.
        factors: ``[N, 4]`` brightness, contrast, saturation, and the hue's shift in turns.
        order: ``[N, 3]`` brightness 0, contrast 1, saturation 2, in the order of their application.
        hue_slot: how many of those three come before the hue, 0 .. 3.
        operations, values: ``[N, n]`` of the policy.
        grayscale, solarize: bool.
        sigma: standard deviation of the blur in pixels, 0 for none.
        cutout: ``[N, 4]`` first row, last row, first column, last column of the square, last ones included.
    """

    top: Array
    left: Array
    height: Array
    width: Array
    hflip: Array = None
    vflip: Array = None
    factors: Array = None
    order: Array = None
    hue_slot: Array = None
    operations: Array = None
    values: Array = None
    grayscale: Array = None
    sigma: Array = None
    solarize: Array = None
    cutout: Array = None


def sample(view: View, u: Array, height: int, width: int) -> Parameters:
    """Parameters of ``view`` for images of ``height x width``, from uniform numbers ``u`` ``[N, view.draws]``."""
    xp = namespace(u)

    def column(name: str) -> Array:
        return u[:, view.columns[name].start]

    def chance(name: str, probability: float) -> Array | None:
        return column(name) < probability if probability > 0 else None

    factors = order = hue_slot = operations = values = sigma = cutout = None
    if view.jitters:
        factors = _jitter_factors(view, u[:, view.columns["factors"]], column("jitter") < view.jitter_p)
        if view.jitter_order == "random":
            order = xp.argsort(u[:, view.columns["order"]], -1)
            hue_slot = xp.floor(4 * column("hue_slot"))
        else:
            order = arange(3, u)[None] + xp.zeros_like(u[:, :3])
            hue_slot = xp.zeros_like(column("hue_slot")) + 3
    if view.policy:
        policy = POLICIES[view.policy]
        operations, values = policy.sample(
            u[:, view.columns["policy"]], view.policy_ops, view.policy_magnitude, view.size
        )
    if view.blur > 0:
        drawn = column("sigma")[:1] if view.blur_per == "batch" else column("sigma")
        low, high = view.blur_sigma
        sigma = xp.where(column("blur") < view.blur, low + (high - low) * drawn, xp.zeros_like(column("blur")))
    if view.cutout[1] > 0:
        cutout = cutout_square(u[:, view.columns["cutout"]], view.cutout, view.size, view.size)
    return Parameters(
        *crop_box(view, u, height, width),
        hflip=chance("hflip", view.hflip),
        vflip=chance("vflip", view.vflip),
        factors=factors,
        order=order,
        hue_slot=hue_slot,
        operations=operations,
        values=values,
        grayscale=chance("grayscale", view.grayscale),
        sigma=sigma,
        solarize=chance("solarize", view.solarize),
        cutout=cutout,
    )


def crop_box(view: View, u: Array, height: int, width: int) -> tuple[Array, Array, Array, Array]:
    """Top, left, height and width ``[N]`` of the crops of ``view`` in an image of ``height x width``."""
    if view.crop == "resized":
        return resized_crop(
            u[:, view.columns["area"]],
            u[:, view.columns["ratio"]],
            u[:, view.columns["place"]],
            height,
            width,
            scale=view.scale,
            ratio=view.ratio,
        )
    if view.crop == "resized_simclr":
        return simclr_crop(
            u[:, view.columns["area"]],
            u[:, view.columns["ratio"]],
            u[:, view.columns["place"]],
            height,
            width,
            scale=view.scale,
            ratio=view.ratio,
            min_object_covered=view.min_object_covered,
        )
    xp = namespace(u)
    if view.crop == "padded":
        place = u[:, view.columns["place"]]
        room = [side + 2 * view.padding - view.size for side in (height, width)]
        top, left = (xp.floor(place[:, k] * (max(room[k], 0) + 1)) + min(room[k], 0) // 2 for k in range(2))
        side = xp.zeros_like(top) + view.size
        return top - view.padding, left - view.padding, side, side
    box: tuple[float, float, float, float] = (0, 0, height, width)
    if view.crop == "center":
        box = center_box(height, width, view.size, view.crop_fraction)
    elif view.crop == "center_simclr":
        box = center_box_simclr(height, width, view.crop_fraction)
    zero = xp.sum(u[:, :0], 1)
    return zero + box[0], zero + box[1], zero + box[2], zero + box[3]


def resized_crop(
    area: Array,
    aspect: Array,
    place: Array,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Array, Array, Array, Array]:
    """Torchvision's RandomResizedCrop: area uniform, aspect uniform in its logarithm, the first attempt that fits.

    Args:
        area, aspect: uniform numbers ``[N, attempts]``.
        place: uniform numbers ``[N, 2]`` for the offsets.
        height, width: of the image, in pixels.
        scale, ratio: ranges of the area (share of the image) and of width / height.

    Returns:
        top, left, height, width, each ``[N]``. Where no attempt fits: the centre with the aspect brought into range.
    """
    xp = namespace(area)
    pixels = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = xp.exp(log_low + (log_high - log_low) * aspect)
    wide, tall = xp.round(xp.sqrt(pixels * aspect)), xp.round(xp.sqrt(pixels / aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    tall, wide = _first(fits, tall), _first(fits, wide)
    found = tall > 0
    top = xp.floor(place[:, 0] * (height - tall + 1))
    left = xp.floor(place[:, 1] * (width - wide + 1))
    whole_tall, whole_wide = height, width
    if width < ratio[0] * height:
        whole_tall = round(width / ratio[0])
    elif width > ratio[1] * height:
        whole_wide = round(height * ratio[1])
    return (
        xp.where(found, top, xp.zeros_like(top) + (height - whole_tall) // 2),
        xp.where(found, left, xp.zeros_like(left) + (width - whole_wide) // 2),
        xp.where(found, tall, xp.zeros_like(tall) + whole_tall),
        xp.where(found, wide, xp.zeros_like(wide) + whole_wide),
    )


def simclr_crop(
    tall: Array,
    aspect: Array,
    place: Array,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    min_object_covered: float = 0.1,
) -> tuple[Array, Array, Array, Array]:
    """SimCLR's random crop: TensorFlow's sample_distorted_bounding_box with the whole image as the object.

    The aspect is uniform, then the height is uniform among the whole numbers that the area allows, so small crops are
    likelier than torchvision's. Offsets never take their last value. Where no attempt fits: the whole image.

    Args:
        tall, aspect: uniform numbers ``[N, attempts]``.
        place: uniform numbers ``[N, 2]`` for the offsets.
        height, width: of the image, in pixels.
        scale, ratio: ranges of the area (share of the image) and of width / height.
        min_object_covered: smallest share of the image a crop may have.

    Returns:
        top, left, height, width, each ``[N]``.
    """
    xp = namespace(tall)
    smallest, largest = scale[0] * height * width, scale[1] * height * width
    aspect = ratio[0] + (ratio[1] - ratio[0]) * aspect
    low, high = xp.round(xp.sqrt(smallest / aspect)), xp.round(xp.sqrt(largest / aspect))
    fitting = xp.floor((width + 0.5 - 1e-7) / aspect)
    fitting = xp.where(xp.round(fitting * aspect) > width, fitting - 1, fitting)
    high = xp.where(xp.round(high * aspect) > width, fitting, high)
    high = xp.clip(high, None, height)
    low = xp.where(low < high, low, high)
    tall = low + xp.floor(tall * (high - low + 1))
    wide = xp.round(tall * aspect)
    tall = xp.where(tall * wide < smallest, tall + 1, tall)
    wide = xp.round(tall * aspect)
    tall = xp.where(tall * wide > largest, tall - 1, tall)
    wide = xp.round(tall * aspect)
    area = tall * wide
    fits = (area >= max(smallest, min_object_covered * height * width)) & (area <= largest)
    fits = fits & (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
    tall, wide = _first(fits, tall), _first(fits, wide)
    found = tall > 0
    tall = xp.where(found, tall, xp.zeros_like(tall) + height)
    wide = xp.where(found, wide, xp.zeros_like(wide) + width)
    return xp.floor(place[:, 0] * (height - tall)), xp.floor(place[:, 1] * (width - wide)), tall, wide


def _first(fits: Array, value: Array) -> Array:
    """The value ``[N, attempts]`` of the first attempt that fits, 0 where none does: ``[N]``."""
    xp = namespace(value)
    first = fits & (xp.cumsum(fits, 1) == 1)
    return xp.sum(xp.where(first, value, xp.zeros_like(value)), 1)


def center_box(height: int, width: int, size: int, crop_fraction: float) -> tuple[float, float, float, float]:
    """Torchvision's Resize(round(size / crop_fraction)) then CenterCrop(size), as one box in source pixels."""
    shorter = max(round(size / crop_fraction), size)
    if height <= width:
        tall, wide = shorter, int(shorter * width / height)
    else:
        tall, wide = int(shorter * height / width), shorter
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return top * height / tall, left * width / wide, size * height / tall, size * width / wide


def center_box_simclr(height: int, width: int, crop_fraction: float) -> tuple[int, int, int, int]:
    """SimCLR's evaluation crop: a square of ``crop_fraction`` of the shorter side, in the centre."""
    side = max(round(crop_fraction * min(height, width)), 1)
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def cutout_square(u: Array, share: tuple[float, float], height: int, width: int) -> Array:
    """First row, last row, first column, last column ``[N, 4]`` of a square around a uniform centre.

    Args:
        u: uniform numbers ``[N, 3]`` for the side and the centre (row, column).
        share: smallest and largest side as a share of the width.
        height, width: of the image. What lies beyond its border is cut off.

    The last row and column belong to the square. A square of side 0 is empty: its last row comes before its first.
    """
    xp = namespace(u)
    side = (share[0] + (share[1] - share[0]) * u[:, 0]) * width
    edges = []
    for centre, length in ((u[:, 1] * height, height), (u[:, 2] * width, width)):
        first = xp.floor(xp.clip(centre - side / 2, 0, None))
        last = xp.floor(xp.clip(first + side, None, length))
        edges += [first, xp.where(side > 0, last, xp.zeros_like(last) - 1)]
    return xp.stack(edges, 1)


def _jitter_factors(view: View, u: Array, applied: Array) -> Array:
    """``[N, 4]``: factors of brightness, contrast and saturation, the hue's shift; neutral where not applied."""
    neutral = NEUTRAL[view.colour]
    lows = [n - s if n == 0 else max(n - s, 0.0) for n, s in zip(neutral, view.jitter, strict=True)]
    highs = [n + s for n, s in zip(neutral, view.jitter, strict=True)]
    low, high, still = (constant(row, u)[None] for row in (lows, highs, neutral))
    return namespace(u).where(applied[:, None], low + (high - low) * u, still)


def boxes(parameters: Parameters, height: int, width: int) -> Array:
    """``[N, 8]``: top, left, height, width of the crop, the source's height and width, hflip, vflip as 0 or 1."""
    xp = namespace(parameters.top)
    zero = xp.zeros_like(parameters.top)
    flips = [zero if flip is None else zero + flip for flip in (parameters.hflip, parameters.vflip)]
    return xp.stack([*parameters[:4], zero + height, zero + width, *flips], -1)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, epoch: int, indices: Array, views: Array, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), ``[N, count]`` float32, a function of (seed, epoch, index, view) alone.

    ``indices`` and ``views`` are ``[N]`` or ``[1]``. SplitMix64 (Steele, Lea, Flood 2014) as a counter: each row is a
    stream of its own, whose key mixes the four numbers.
    """
    stream = _mix(_stream(seed, epoch, indices, views)[:, None] + _counters(count))
    return (stream >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def seeds(seed: int, epoch: int, indices: Array, views: Array) -> list[int]:
    """A number of 32 bits for each row of `uniforms`, for generators that are not ours."""
    return (_mix(_stream(seed, epoch, indices, views)) >> np.uint64(32)).tolist()


def _stream(seed: int, epoch: int, indices: Array, views: Array) -> np.ndarray:
    """The key of each row's stream, ``[N]`` uint64."""
    key = _mix(_key(seed, epoch) + np.asarray(indices, np.int64).astype(np.uint64) + _GOLDEN)
    return _mix(key + np.asarray(views, np.int64).astype(np.uint64) + _GOLDEN)


@functools.lru_cache(maxsize=64)
def _key(seed: int, epoch: int) -> np.ndarray:
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch):
        key = _mix(key + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
    return key


@functools.lru_cache(maxsize=64)
def _counters(count: int) -> np.ndarray:
    return _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
