"""Augmentation policies: which operations are drawn, and with which values. How they act stands in the two engines.

A policy turns uniform numbers into, per image, a row of operations (numbers into `OPERATIONS`) and their values in
final units: a factor, a threshold, degrees, pixels. Both engines read those two arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from selfsight.datamodules.views.arrays import Array, constant, namespace
from selfsight.errors import UserError

OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "LiftDark",
)
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


@dataclass(frozen=True)
class Entry:
    """An operation of a pool: its value runs from ``low`` to ``high``; ``signed`` values are negated half the time.

    Translations are shares of the image's side. ``neutral`` is added after the sign (1 for factors around 1).
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    neutral: float = 0.0


@dataclass(frozen=True)
class Pool:
    """RandAugment and its relatives: operations drawn with replacement from a pool.

    Attributes:
        entries: the pool.
        level: how far a value lies between low and high: ``uniform`` in 0 .. 1; ``integer``: k / 10 with k from 1 to
            magnitude - 1; ``fixed``: magnitude / bins; ``bin``: any of 0 .. bins, divided by bins.
        bins: see ``level``.
        probability: of applying each drawn operation.
        whole_pixels: translations are cut to whole pixels.
        nearest_bits: bits of Posterize are rounded instead of cut.
        single: always one operation.
    """

    entries: tuple[Entry, ...]
    level: str
    bins: int = 10
    probability: float = 1.0
    whole_pixels: bool = False
    nearest_bits: bool = False
    single: bool = False

    @property
    def graded(self) -> bool:
        """Whether it has a magnitude."""
        return self.level in ("integer", "fixed")

    def weakened(self, magnitude: float, strength: float) -> float:
        """A share of a magnitude, or the nearest one that the policy has."""
        return max(2, round(magnitude * strength)) if self.level == "integer" else magnitude * strength

    def count(self, ops: int) -> int:
        return 1 if self.single else ops

    def check(self, ops: int, magnitude: float) -> None:
        if self.level == "integer" and not (2 <= magnitude <= 10 and float(magnitude).is_integer()):
            raise UserError(
                f"View: policy_magnitude is {magnitude}; it has to be a whole number from 2 to 10 for this policy."
            )
        if self.level == "fixed" and not 0 <= magnitude <= self.bins:
            raise UserError(
                f"View: policy_magnitude is {magnitude}; it has to lie between 0 and {self.bins} for this policy."
            )

    def sample(self, u: Array, ops: int, magnitude: float, size: int) -> tuple[Array, Array]:
        """Operations and values, both ``[N, ops]`` float, from uniform numbers ``[N, 4 ops]``."""
        n = self.count(ops)
        xp = namespace(u)
        pick = xp.floor(u[:, :n] * len(self.entries))
        if self.level == "uniform":
            level = u[:, n : 2 * n]
        elif self.level == "integer":
            level = (1 + xp.floor(u[:, n : 2 * n] * (magnitude - 1))) / 10
        elif self.level == "bin":
            level = xp.floor(u[:, n : 2 * n] * (self.bins + 1)) / self.bins
        else:
            level = 0 * pick + magnitude / self.bins
        kept = u[:, 2 * n : 3 * n] < self.probability
        negative = u[:, 3 * n :] < 0.5
        operations, values = self.values(pick, level, negative, size)
        return xp.where(kept, operations, 0 * operations), values

    def values(self, pick: Array, level: Array, negative: Array, size: int) -> tuple[Array, Array]:
        """Operation numbers and final values of the entries ``pick`` at ``level`` in 0 .. 1 (arrays of one shape)."""
        xp = namespace(pick)
        columns = [(_NUMBER[e.name], e.low, e.high - e.low, float(e.signed), e.neutral) for e in self.entries]
        table = constant(columns, pick)[xp.asarray(pick, dtype=xp.int64)]
        number, low, span, signed, neutral = (table[..., k] for k in range(5))
        value = low + span * level
        moves = (number == _NUMBER["TranslateX"]) | (number == _NUMBER["TranslateY"])
        pixels = value * size
        value = xp.where(moves, _cut(xp, pixels) if self.whole_pixels else pixels, value)
        bits = xp.round(value) if self.nearest_bits else _cut(xp, value)
        value = xp.where(number == _NUMBER["Posterize"], bits, value)
        return number, neutral + xp.where(negative & (signed > 0), -value, value)


def _cut(xp: Any, value: Array) -> Array:
    """Towards zero, sparing what rounding has put just below a whole number."""
    return xp.sign(value) * xp.floor(xp.abs(value) + 1e-3)


@dataclass(frozen=True)
class AutoAugment:
    """Fixed pairs of operations, one pair drawn per image (Cubuk et al. 2019, arXiv 1805.09501, ImageNet policy).

    ``pairs`` hold ``(name, probability, level)`` twice, levels on the scale 0 .. 9 of ``entries``.
    """

    entries: tuple[Entry, ...]
    pairs: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]

    graded = False

    def count(self, ops: int) -> int:
        return 2

    def weakened(self, magnitude: float, strength: float) -> float:
        """The magnitude, which means nothing here."""
        return magnitude

    def check(self, ops: int, magnitude: float) -> None:
        """Nothing of this policy can be set."""

    def sample(self, u: Array, ops: int, magnitude: float, size: int) -> tuple[Array, Array]:
        """Operations and values, both ``[N, 2]`` float, from uniform numbers ``[N, 8]``."""
        xp = namespace(u)
        place = {entry.name: k for k, entry in enumerate(self.entries)}
        rows = [[(place[name], p, level / 9) for name, p, level in pair] for pair in self.pairs]
        table = constant(rows, u)[xp.asarray(xp.floor(u[:, 0] * len(rows)), dtype=xp.int64)]
        pool = Pool(self.entries, "uniform", whole_pixels=True, nearest_bits=True)
        operations, values = pool.values(table[..., 0], table[..., 2], u[:, 6:8] < 0.5, size)
        return xp.where(u[:, 4:6] < table[..., 1], operations, 0 * operations), values


def _pool(**ranges: tuple[float, float] | None) -> tuple[Entry, ...]:
    """Entries in the order given; None is an operation without a value."""
    return tuple(Entry(name, *(span or ()), **_SIGNS.get(name, {})) for name, span in ranges.items())


_SIGNS: dict[str, Any] = {
    name: {"signed": True} for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "SolarizeAdd")
}

_FIXMATCH = _pool(
    AutoContrast=None,
    Brightness=(0.05, 0.95),
    Color=(0.05, 0.95),
    Contrast=(0.05, 0.95),
    Equalize=None,
    Identity=None,
    Posterize=(4, 8),
    Rotate=(0, 30),
    Sharpness=(0.05, 0.95),
    ShearX=(0, 0.3),
    ShearY=(0, 0.3),
    Solarize=(256, 0),
    TranslateX=(0, 0.3),
    TranslateY=(0, 0.3),
)
_SIMMATCH = _pool(
    AutoContrast=None,
    Brightness=(0.1, 1.9),
    Color=(0.1, 1.9),
    Contrast=(0.1, 1.9),
    Equalize=None,
    Identity=None,
    Invert=None,
    Posterize=(4, 8),
    Rotate=(0, 30),
    Sharpness=(0.1, 1.9),
    ShearX=(0, 0.3),
    ShearY=(0, 0.3),
    Solarize=(256, 0),
    SolarizeAdd=(0, 110),
    TranslateX=(0, 0.45),
    TranslateY=(0, 0.45),
)
# USB draws from the whole signed range instead of drawing a sign
_USB = tuple(Entry(e.name, -e.high if e.signed else e.low, e.high) for e in _FIXMATCH)
_USB = tuple(Entry(e.name, 0, 256) if e.name == "Solarize" else e for e in _USB)


def _torchvision_pool(factor: float, bits: float, degrees: float, shear: float, shift: float) -> tuple[Entry, ...]:
    """Torchvision's pool, from no effect to the given strengths; factors lie on both sides of 1."""
    around_one = {name: Entry(name, 0, factor, True, 1.0) for name in ("Brightness", "Color", "Contrast", "Sharpness")}
    return (
        Entry("Identity"),
        *_pool(ShearX=(0, shear), ShearY=(0, shear), TranslateX=(0, shift), TranslateY=(0, shift), Rotate=(0, degrees)),
        *around_one.values(),
        *_pool(Posterize=(8, bits), Solarize=(255, 0), AutoContrast=None, Equalize=None),
    )


_RANDAUGMENT = _torchvision_pool(0.9, 4, 30, 0.3, 150 / 331)
_TRIVIAL = _torchvision_pool(0.99, 2, 135, 0.99, 32 / 224)
# timm's "increasing" operations (timm.data.auto_augment), one severity for all; its magnitudes are tenths
_TIMM = (
    *_pool(AutoContrast=None, Equalize=None, Invert=None, Rotate=(0, 30)),
    Entry("Posterize", 0, -4, neutral=4),
    Entry("Solarize", 0, -256, neutral=256),
    Entry("LiftDark", 0, 110),
    *(Entry(name, 0, 0.9, True, 1.0) for name in ("Color", "Contrast", "Brightness", "Sharpness")),
    *_pool(ShearX=(0, 0.3), ShearY=(0, 0.3), TranslateX=(0, 0.45), TranslateY=(0, 0.45)),
)
_AUTOAUGMENT_PAIRS = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)

#: by name: FixMatch's RandAugment as in the SimMatch family, SimMatch's wider pool for ImageNet, USB's and TorchSSL's,
#: torchvision's RandAugment and TrivialAugment (whose 32 pixels of translation are meant for 224), timm's RandAugment
#: (``rand-m9-inc1`` at a magnitude of 9), and AutoAugment's ImageNet policy
POLICIES: dict[str, Pool | AutoAugment] = {
    "fixmatch": Pool(_FIXMATCH, "integer", probability=0.5, whole_pixels=True),
    "simmatch_imagenet": Pool(_SIMMATCH, "integer", whole_pixels=True),
    "usb": Pool(_USB, "uniform"),
    "randaugment": Pool(_RANDAUGMENT, "fixed", bins=30, whole_pixels=True, nearest_bits=True),
    "trivialaugment": Pool(_TRIVIAL, "bin", bins=30, whole_pixels=True, nearest_bits=True, single=True),
    "randaugment_timm": Pool(_TIMM, "fixed", probability=0.5),
    "autoaugment": AutoAugment((*_RANDAUGMENT, Entry("Invert")), _AUTOAUGMENT_PAIRS),
}
