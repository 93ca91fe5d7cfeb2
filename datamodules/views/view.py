"""What one view of an image is: a frozen description that both engines follow.

`View` says which random operations make a view and how strong they are. `sampling.sample` draws their parameters;
`cpu_views` applies them to one image after another on CPU workers, `device_views` to whole batches on the device.

Order of the operations, from which every recipe here takes a subset:
crop and resize, flip, colour jitter, policy, grayscale, blur, solarize, cutout, operations of one's own, normalise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from selfsight.datamodules.views.kernels import pillow_radius
from selfsight.datamodules.views.policies import POLICIES
from selfsight.errors import UserError, nearest

CROPS = {
    "resized": "random area and aspect, resized (torchvision's RandomResizedCrop)",
    "resized_simclr": "the same after TensorFlow's sample_distorted_bounding_box, as SimCLR's authors use it",
    "padded": "random place in the padded image, not resized (CIFAR)",
    "center": "shorter side resized to size / crop_fraction, then the centre (evaluation)",
    "center_simclr": "central square of crop_fraction of the shorter side, then resized (SimCLR's evaluation)",
    "whole": "the whole image, resized if it has another size",
}
INTERPOLATIONS = {
    "bilinear": "antialiased, as Pillow and torchvision resize",
    "bicubic": "antialiased, as Pillow and torchvision resize",
    "bicubic_simclr": "TensorFlow 2's cubic: half-pixel centres, no antialiasing, not clipped",
    "bicubic_simclr_tf1": "TensorFlow 1's cubic: aligned corners, no antialiasing, not clipped",
}
COLOURS = {
    "torchvision": "Pillow's and torchvision's operations",
    "simclr": "contrast around the mean of each channel, saturation in HSV (SimCLR's TensorFlow code)",
    "simclr_v1": "as simclr, but brightness adds instead of multiplying (SimCLR version 1)",
}
BLURS = {
    "gaussian": "true Gaussian, reflected borders (torchvision)",
    "pillow": "three box blurs, repeated borders (Pillow)",
    "simclr": "Gaussian over a fixed number of taps, borders darken (SimCLR's TensorFlow code)",
}


@dataclass(frozen=True)
class View:
    """One kind of view, drawn ``count`` times from each image. The defaults leave an image as evaluation sees it.

    Attributes:
        size: side of the square view in pixels; below 1 it is a share of ``image_size``, and becomes pixels.
        image_size: what shares refer to.
        count: how many such views of one image.
        crop: one of `CROPS`.
        scale: smallest and largest area of the crop as a share of the image (``resized*``).
        ratio: smallest and largest width / height of the crop (``resized*``).
        min_object_covered: smallest area that ``resized_simclr`` accepts, as a share of the image.
        padding, padding_mode: pixels (or a share of ``size``, which becomes pixels) added on each side before a
            ``padded`` crop; ``zeros`` or ``reflect``.
        crop_fraction: share of the shorter side that a ``center*`` crop keeps.
        interpolation: one of `INTERPOLATIONS`.
        hflip, vflip: probability of a flip.
        jitter: strengths of brightness, contrast, saturation (factors within 1 - s .. 1 + s) and hue (turns, to 0.5).
        jitter_p: probability that the jitter is applied at all.
        jitter_order: ``random`` per image, or ``fixed`` (brightness, contrast, saturation, hue).
        colour: one of `COLOURS`.
        grayscale: probability of three equal channels.
        blur: probability of a blur.
        blur_sigma: smallest and largest standard deviation in pixels (Pillow's radius).
        blur_kernel: one of `BLURS`.
        blur_taps: width of the kernel in pixels, odd. By default a ``simclr`` kernel spans a tenth of ``size``, a
            ``gaussian`` one four times the largest sigma each way. Pillow's blur knows no such width.
        blur_per: ``image`` draws sigma for each image, ``batch`` once for a batch, as SimCLR's code does.
        solarize: probability that values from ``solarize_threshold`` (of 255) on are inverted.
        policy: one of `policies.POLICIES`, or None.
        policy_ops, policy_magnitude: number of operations and magnitude, where the policy has such a setting.
        cutout: smallest and largest side of a filled square as a share of ``size``; (0, 0) is none.
        cutout_fill: its colour (of 255).
        gain: each channel is multiplied by a factor of its own within 1 - g .. 1 + g.
        noise: standard deviation of noise on every value, as a share of its channel's own over the data set.
        drop: probability that a channel is replaced by its mean; one of an image stays. These three, too, come before
            mean and std, and with any of them views are made as `band_views` does it.
        mean, std: per channel, of values in 0 .. 1; None leaves the view in 0 .. 1.
        transforms: operations of one's own, in their order, before mean and std: functions from ``[H, W, 3]`` uint8 to
            the same, transforms of torchvision (``torchvision.transforms.v2``) or of albumentations; see
            `own_operations`. They are made on the CPU, image by image.

    Raises:
        UserError: a value that no view can have.
    """

    size: int
    count: int = 1
    image_size: int | None = None
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    min_object_covered: float = 0.1
    padding: int = 0
    padding_mode: str = "zeros"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    hflip: float = 0.0
    vflip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    jitter_order: str = "random"
    colour: str = "torchvision"
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: str = "gaussian"
    blur_taps: int | None = None
    blur_per: str = "image"
    solarize: float = 0.0
    solarize_threshold: int = 128
    policy: str | None = None
    policy_ops: int = 2
    policy_magnitude: float = 10
    cutout: tuple[float, float] = (0.0, 0.0)
    cutout_fill: tuple[int, int, int] = (127, 127, 127)
    gain: float = 0.0
    noise: float = 0.0
    drop: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    transforms: tuple[Callable[..., Any], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if callable(value):  # one transform, which may itself be a sequence of others
                object.__setattr__(self, each.name, (value,))
            elif isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, each.name, tuple(value))
        self._to_pixels("size", self.image_size)
        self._to_pixels("padding", self.size)
        self._check_names()
        self._check_numbers()

    def _to_pixels(self, name: str, whole: int | None) -> None:
        value = getattr(self, name)
        if _number(value) and 0 < value < 1:
            _require(_whole(whole), name, value, "is a share; give image_size, too, or a whole number of pixels")
            object.__setattr__(self, name, max(round(value * (whole or 1)), 1))

    def _check_names(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "crop": CROPS,
            "interpolation": INTERPOLATIONS,
            "colour": COLOURS,
            "blur_kernel": BLURS,
            "blur_per": ("image", "batch"),
            "jitter_order": ("random", "fixed"),
            "padding_mode": ("zeros", "reflect"),
        }
        if self.policy is not None:
            choices["policy"] = POLICIES
        for name, allowed in choices.items():
            value = getattr(self, name)
            hint = f"is unknown; choose one of {', '.join(allowed)}.{nearest(str(value), allowed)}"
            _require(value in allowed, name, value, hint)

    def _check_numbers(self) -> None:
        for name in ("size", "count", "policy_ops"):
            value = getattr(self, name)
            _require(_whole(value) and value >= 1, name, value, "has to be a whole number of at least 1")
        _require(_whole(self.padding) and self.padding >= 0, "padding", self.padding, "has to be 0 or more pixels")
        for name in ("hflip", "vflip", "jitter_p", "grayscale", "blur", "solarize", "min_object_covered"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value <= 1, name, value, "has to lie between 0 and 1")
        for name in ("gain", "drop"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value < 1, name, value, "has to lie between 0 and 1")
        _require(_number(self.noise) and self.noise >= 0, "noise", self.noise, "has to be at least 0")
        for name, length in _LENGTHS.items():
            value = getattr(self, name)
            given = isinstance(value, tuple) and len(value) == length and all(_number(v) for v in value)
            _require(given, name, value, f"has to be a list of {length} numbers")
        for name in ("mean", "std"):
            value = getattr(self, name)
            given = isinstance(value, tuple) and len(value) > 0 and all(_number(v) for v in value)
            _require(value is None or given, name, value, "has to be a list of numbers, one for each channel")
        for name, low, high in (
            ("scale", 1e-9, 1),
            ("ratio", 1e-9, math.inf),
            ("blur_sigma", 1e-9, math.inf),
            ("cutout", 0, 1),
        ):
            value = getattr(self, name)
            within = "be above 0" if high > 1 else "lie within 0 .. 1"
            _require(low <= value[0] <= value[1] <= high, name, value, f"has to rise and to {within}")
        _require(0 < self.crop_fraction <= 1, "crop_fraction", self.crop_fraction, "has to be above 0 and at most 1")
        _require(min(self.jitter) >= 0, "jitter", self.jitter, "has to hold strengths of at least 0")
        _require(self.jitter[3] <= 0.5, "jitter", self.jitter, "has to end with a hue of at most 0.5 (half a turn)")
        strong = self.colour != "torchvision" and max(self.jitter[1:3]) > 1
        _require(
            not strong,
            "jitter",
            self.jitter,
            f"makes contrast or saturation negative where colour is {self.colour}; use at most 1",
        )
        odd = self.blur_taps is None or (_whole(self.blur_taps) and self.blur_taps > 0 and self.blur_taps % 2 == 1)
        _require(odd, "blur_taps", self.blur_taps, "has to be an odd number of pixels")
        _require(
            0 <= self.solarize_threshold <= 256, "solarize_threshold", self.solarize_threshold, "has to lie in 0 .. 256"
        )
        _require((self.mean is None) == (self.std is None), "mean", self.mean, "comes with std: give both or neither")
        _require(self.std is None or min(self.std) > 0, "std", self.std, "has to be above 0 in every channel")
        if self.policy is not None:
            POLICIES[self.policy].check(self.policy_ops, self.policy_magnitude)
        own = isinstance(self.transforms, tuple) and all(map(callable, self.transforms))
        _require(own, "transforms", self.transforms, "has to be a list of functions or transforms")

    @property
    def jitters(self) -> bool:
        return self.jitter_p > 0 and any(self.jitter)

    @property
    def graded(self) -> bool:
        """Whether it has a policy with a magnitude."""
        return self.policy is not None and POLICIES[self.policy].graded

    def weakened(self, strength: float) -> View:
        """The view with this share of its policy's magnitude; itself where it has none."""
        if not self.graded or strength == 1:
            return self
        assert self.policy is not None
        magnitude = POLICIES[self.policy].weakened(self.policy_magnitude, strength)
        return replace(self, policy_magnitude=magnitude)

    @property
    def of_channels(self) -> bool:
        """Whether it does anything to channels one by one."""
        return max(self.gain, self.noise, self.drop) > 0

    @property
    def taps(self) -> int:
        """Width of the blur kernel in pixels."""
        if self.blur_taps is not None:
            return self.blur_taps
        reach = self.size // 10 // 2 if self.blur_kernel == "simclr" else math.ceil(4 * self.blur_sigma[1])
        return 2 * reach + 1

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Where each operation finds its uniform numbers in a row of `draws` of them."""
        attempts = {"resized": RESIZED_ATTEMPTS, "resized_simclr": SIMCLR_ATTEMPTS}.get(self.crop, 0)
        widths = {
            "area": attempts,
            "ratio": attempts,
            "place": 2 if attempts or self.crop == "padded" else 0,
            "hflip": int(self.hflip > 0),
            "vflip": int(self.vflip > 0),
            "jitter": 1 if self.jitters else 0,
            "factors": 4 if self.jitters else 0,
            "order": 3 if self.jitters else 0,
            "hue_slot": 1 if self.jitters else 0,
            "policy": 4 * POLICIES[self.policy].count(self.policy_ops) if self.policy else 0,
            "grayscale": int(self.grayscale > 0),
            "blur": int(self.blur > 0),
            "sigma": int(self.blur > 0),
            "solarize": int(self.solarize > 0),
            "cutout": 3 if self.cutout[1] > 0 else 0,
        }
        columns, start = {}, 0
        for name, width in widths.items():
            columns[name] = slice(start, start + width)
            start += width
        return columns

    @property
    def draws(self) -> int:
        """Uniform numbers that one view consumes."""
        return max(column.stop for column in self.columns.values())

    @property
    def blur_radius(self) -> int:
        """Farthest pixel that the widest blur of this view reaches."""
        if self.blur_kernel == "pillow":
            return pillow_radius(self.blur_sigma[1])
        return self.taps // 2


RESIZED_ATTEMPTS = 10
SIMCLR_ATTEMPTS = 100


def expand(views: Sequence[View]) -> list[View]:
    """Each view repeated ``count`` times, in order: one entry per tensor of a batch."""
    if not views:
        raise UserError("No view was given; a recipe needs at least one, for example views=simclr.")
    return [view for view in views for _ in range(view.count)]


_LENGTHS = {"scale": 2, "ratio": 2, "blur_sigma": 2, "cutout": 2, "jitter": 4, "cutout_fill": 3}


def _require(holds: bool, name: str, value: Any, sentence: str) -> None:
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise UserError(f"View: {name}={shown} {sentence}{'' if sentence.endswith(('.', '?')) else '.'}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
