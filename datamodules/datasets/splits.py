"""Which images keep their labels, and which are held out: a function for each published rule."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.datasets import checks
from selfsight.datamodules.datasets.amounts import refuse_other_than_one
from selfsight.datamodules.datasets.checks import composed
from selfsight.datamodules.datasets.dataset import ImageData
from selfsight.datamodules.datasets.lists import listed
from selfsight.datamodules.images.sets import ImageSet, join
from selfsight.errors import UserError
from selfsight.validation import SHARE, expect, number, one_of, whole

RULES = ("balanced", "proportional", "first_k", "first_percent", "usb", "torchssl", "list", "all")
SOME = number("a share above 0 and at most 1", lambda v: 0 < v <= 1)


@dataclass(frozen=True)
class LabelSplit:
    """The images that keep their labels.

    Attributes:
        indices: their positions in the set, in the order of the rule.
        images: size of the set. fingerprint: hash of its labels and names, so that a split is not used on another set.
        rule: how they were chosen, with its amounts and seed.
    """

    indices: tuple[int, ...]
    images: int
    fingerprint: str
    rule: dict[str, object]

    def __len__(self) -> int:
        return len(self.indices)

    def tensor(self) -> Tensor:
        """``[n]`` int64."""
        return torch.tensor(self.indices, dtype=torch.int64)

    def write(self, path: Path | str) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str, images: ImageSet) -> LabelSplit:
        """A written split, for the set it was made of.

        Raises:
            UserError: no such file, not a split, or one of another set of images.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            split = cls(tuple(map(int, stored["indices"])), stored["images"], stored["fingerprint"], stored["rule"])
        except OSError as error:
            raise UserError(f"the label split '{path}' cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' is no label split; one is written into every run that uses labels.") from error
        if split.fingerprint != fingerprint(images):
            raise UserError(
                f"the label split '{path}' was made for another set of {split.images} images (this one has "
                f"{len(images)}): choose the same data set, seed and test_fraction."
            )
        return split


def select_labels(
    images: ImageSet,
    *,
    rule: str = "balanced",
    per_class: int | None = None,
    total: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    file: Path | str | None = None,
    sha256: str | None = None,
    classes: Sequence[str] = (),
) -> LabelSplit:
    """Choose the images that keep their labels.

    Exactly one of ``per_class``, ``total`` and ``fraction`` says how many (none with ``list`` and ``all``).

    Args:
        images: a labelled set.
        rule: ``balanced``: as many of every class (the rest: by ``seed``); ``proportional``: in proportion to the
            classes; ``first_k``: the first of every class (RotNet); ``first_percent``: the same for
            a fraction (SimMatchV2's rule); ``usb``, ``torchssl``: the draws of these libraries for ``seed``;
            ``list``: the names in ``file``; ``all``: every image that has one.
        sha256: of the list: one of `lists.PUBLISHED_LISTS` or 64 hexadecimal digits; another content is refused.
        classes: names for the sentences about what is wrong.

    Raises:
        UserError: more asked for than there is, a class without any label, an impossible amount, a wrong list.
    """
    expect("labels.rule", rule, one_of(*RULES))
    expect("labels.seed", seed, whole(0, 2**32 - 1))
    if images.known is None:
        raise UserError("the images have no labels to choose from: use class folders or a labels.csv.")
    labels = images.labels
    if labels is not None:
        classes = tuple(classes) or tuple(str(c) for c in range(int(labels.max()) + 1))
    amounts = {"per_class": per_class, "total": total, "fraction": fraction}
    if rule == "list":
        if file is None:
            raise UserError("labels.rule=list needs the file of names: use labels.list=FILE.")
        chosen = listed(images, checks.path("labels.list", file), sha256)
    elif rule == "all":
        chosen = images.known.nonzero().flatten()
    else:
        refuse_other_than_one(amounts)
        given = {key: value for key, value in amounts.items() if value is not None}
        if labels is None:
            chosen = _drawn(images.known, rule, given, seed)
        else:
            chosen = _RULES[rule](labels, _counts(labels, classes, rule, given), seed)
    if labels is not None:
        missing = [name for c, name in enumerate(classes) if not bool((labels[chosen] == c).any())]
        if missing:
            raise UserError(
                f"class '{missing[0]}' would be left without any label ({len(missing)} of {len(classes)} classes "
                "would): ask for more labels, or choose labels.rule=balanced."
            )
    how: dict[str, object] = {"rule": rule, "per_class": per_class, "total": total, "fraction": fraction, "seed": seed}
    how["list"] = None if file is None else Path(file).name
    return LabelSplit(tuple(chosen.tolist()), len(images), fingerprint(images), how)


def chosen_labels(images: ImageSet, choice: LabelSplit | Mapping[str, Any], classes: Sequence[str] = ()) -> LabelSplit:
    """A split as it is, or chosen with the arguments of `select_labels`.

    Two files stand in for them: ``split``, which another run has written, and ``list``, the names of the images.

    Raises:
        UserError: what `select_labels` refuses, or an amount beside a file.
    """
    if isinstance(choice, LabelSplit):
        return choice
    given = {str(key): value for key, value in choice.items() if value is not None}
    refuse_other_than_one(given)
    if "split" in given:
        return LabelSplit.read(checks.path("labels.split", given["split"]), images)
    if "list" in given:
        given |= {"rule": "list", "file": given.pop("list")}
    return select_labels(images, **given, classes=classes)


def hide_labels(data: ImageData, split: LabelSplit) -> ImageData:
    """The same images, those outside the split without labels: ``train`` is the split, ``unlabelled`` all others."""
    rest = torch.ones(len(data.train), dtype=torch.bool)
    rest[split.tensor()] = False
    others = data.train.select(rest.nonzero().flatten())
    others.labels = others.targets = None
    unlabelled = join(others, data.unlabelled) if len(others) or data.unlabelled is not None else None
    return replace(data, train=data.train.select(split.tensor()), unlabelled=unlabelled)


def fingerprint(images: ImageSet) -> str:
    """A hash of labels and names, 16 hexadecimal digits."""
    known = images.labels if images.targets is None else images.targets.values
    content = hashlib.sha256(b"" if known is None else known.numpy().tobytes())
    for index in range(len(images)):
        content.update(images.name(index).encode(errors="surrogateescape") + b"\n")
    return content.hexdigest()[:16]


def _drawn(known: Tensor, rule: str, amount: dict[str, float | int], seed: int) -> Tensor:
    """Images with several labels or numbers each, by ``seed``: there are no classes to draw from in turn."""
    (key, value), there = next(iter(amount.items())), known.nonzero().flatten()
    if key == "per_class" or rule not in ("balanced", "proportional"):
        asked = "labels.per_class" if key == "per_class" else f"labels.rule={rule}"
        raise UserError(
            f"{asked} draws from one class after the other, and these images have several labels or numbers in place "
            "of one class each: give labels.fraction, labels.total or labels.rule=all."
        )
    value = expect(f"labels.{key}", value, SOME if key == "fraction" else whole(1))
    total = value if key == "total" else round(value * len(there))
    if not 0 < total <= len(there):
        raise UserError(f"{total} labels are asked for (labels.{key}={value}) and {len(there)} exist.")
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
    return there[order[: int(total)]].sort().values


def _counts(labels: Tensor, classes: Sequence[str], rule: str, amount: dict[str, float | int]) -> list[int]:
    """Labels to keep in each class; UserError when there are not enough."""
    available = torch.bincount(labels[labels >= 0], minlength=len(classes))
    (key, value), number = next(iter(amount.items())), len(classes)
    value = expect(f"labels.{key}", value, SOME if key == "fraction" else whole(1))
    if rule == "first_percent":
        if key != "fraction":
            raise UserError("labels.rule=first_percent takes labels.fraction.")
        return percent_counts(available, value)
    total = value * number if key == "per_class" else value if key == "total" else round(value * int(available.sum()))
    total = int(total)
    if total > int(available.sum()):
        raise UserError(f"{total} labels are asked for (labels.{key}={value}) and {int(available.sum())} exist.")
    if rule == "proportional":
        counts = allocate(available, total).tolist()
    elif rule == "balanced":
        counts = [total // number + (c < total % number) for c in range(number)]
    else:
        if total % number:
            raise UserError(
                f"labels.rule={rule} takes as many of each of the {number} classes; {total} is no multiple."
            )
        counts = [total // number] * number
    for name, wanted, there in zip(classes, counts, available.tolist(), strict=True):
        if wanted > there:
            raise UserError(
                f"class '{name}' has {there} images and {wanted} labels are asked for; ask for fewer, and where "
                "limit_images (debug=smoke: 64) leaves images out, for more of these."
            )
    return counts


def percent_counts(available: Tensor, fraction: float) -> list[int]:
    """A fraction of each class, rounded, at least one image (SimMatchV2's ``keep_percent``)."""
    return [max(1, round(fraction * n)) for n in available.tolist()]


def allocate(counts: Tensor, total: int) -> Tensor:
    """``total`` shared out in proportion to ``counts [C]``, in whole numbers, largest remainders first."""
    exact = counts.double() * total / counts.sum()
    share = exact.floor().long()
    missing = total - int(share.sum())
    order = torch.argsort(exact - share, descending=True, stable=True)
    share[order[:missing]] += 1
    return share


def hold_out(labels: Tensor | None, images: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the held-out images, ascending; from every class in proportion, where there are any.

    ``ceil(fraction * images)`` images are held out, but never all of a class.

    Raises:
        UserError: a fraction that leaves nothing on one side, or no class of two images.
    """
    total = _check_fraction(fraction, images)
    generator = torch.Generator().manual_seed(expect("dataset.seed", seed, whole(0)))
    classes = torch.zeros(images, dtype=torch.int64) if labels is None else labels
    names, counts = classes.unique(return_counts=True)
    held = []
    for name, share in zip(names, torch.minimum(allocate(counts, total), counts - 1).tolist(), strict=True):
        members = (classes == name).nonzero().flatten()
        held.append(members[torch.randperm(len(members), generator=generator)[:share]])
    test = torch.cat(held).sort().values
    if not len(test):
        raise _each_alone(images)
    kept = torch.ones(images, dtype=torch.bool)
    kept[test] = False
    return kept.nonzero().flatten(), test


def hold_out_by_name(names: Sequence[str], labels: Tensor | None, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the held-out images, ascending: about ``fraction`` of them, each by its name alone.

    A name is turned into a number from 0 to 1 by a hash with ``seed`` as its key, and held out below ``fraction``: an
    image stays on its side whatever is added to the others or taken away. Two exceptions for few images: of a class
    that would be held out as a whole the image with the largest number is kept, and where no image would be held out,
    the one with the smallest number is.

    Raises:
        UserError: a fraction that leaves nothing on one side, or no class of two images.
    """
    _check_fraction(fraction, len(names))
    key = str(expect("dataset.seed", seed, whole(0))).encode()
    number = torch.tensor([_share(name, key) for name in names], dtype=torch.float64)
    classes = torch.zeros(len(names), dtype=torch.int64) if labels is None else labels
    held = number < fraction
    for name, count in zip(*classes.unique(return_counts=True), strict=True):
        members = (classes == name).nonzero().flatten()
        if int(held[members].sum()) == int(count):
            held[members[number[members].argmax()]] = False
    if not held.any():
        several = torch.bincount(classes - classes.min())[classes - classes.min()] > 1
        if not several.any():
            raise _each_alone(len(names))
        held[torch.where(several, number, torch.inf).argmin()] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _share(name: str, key: bytes) -> float:
    """A number from 0 to 1 by a name, the same on every system."""
    text = composed(name).replace(os.sep, "/").encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, key=key).digest(), "big") / 2**56


def _check_fraction(fraction: float, images: int) -> int:
    """Number of images that a share comes to."""
    fraction = expect("dataset.test_fraction", fraction, SHARE)
    total = -int(-fraction * images // 1)
    if not 0 < fraction < 1 or not 0 < total < images:
        raise UserError(
            f"test_fraction is {fraction} of {images} images; between 0 and 1, it has to leave some on both sides."
        )
    return total


def _each_alone(images: int) -> UserError:
    return UserError(
        f"none of the {images} images can be held out, since each is the only one of its class: set "
        "dataset.labels=none, or name a folder of test images, dataset.test=DIR."
    )


def seeded(labels: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """``counts[c]`` images of every class ``c``, drawn without replacement; ascending indices."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c, count in enumerate(counts):
        members = (labels == c).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def balanced(labels: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """`seeded`, with the counts handed to the classes in a random order: which class gets one more is chance."""
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    enough = [int((labels == c).sum()) for c in range(len(counts))]
    shuffled = [counts[order[c]] for c in range(len(counts))]
    fits = all(n <= there for n, there in zip(shuffled, enough, strict=True))
    return seeded(labels, shuffled if fits else counts, seed)


def first_per_class(labels: Tensor, counts: Sequence[int], by_class: bool = False) -> Tensor:
    """The first ``counts[c]`` images of every class in the order of the set (RotNet's few-label subsets).

    Ascending indices, or one class after the other (``by_class``: SimMatchV2's ``keep_percent`` rule).
    """
    chosen = torch.cat([(labels == c).nonzero().flatten()[:count] for c, count in enumerate(counts)])
    return chosen if by_class else chosen.sort().values


def usb_split(labels: Tensor, counts: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """USB's labelled images and the rest, one class after the other.

    numpy's global generator, seeded, shuffles the images of each class in turn; the first are labelled
    (``semilearn/datasets/utils.py``). USB then trains without labels on both parts.
    """
    generator = np.random.RandomState(seed)
    labelled, rest = [], []
    for c, count in enumerate(counts):
        members = np.where(labels.numpy() == c)[0]
        generator.shuffle(members)
        labelled.append(members[:count])
        rest.append(members[count:])
    return torch.from_numpy(np.concatenate(labelled)), torch.from_numpy(np.concatenate(rest))


def torchssl_split(labels: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """TorchSSL's labelled images, one class after the other: ``numpy.random.choice`` of each, seeded once."""
    generator = np.random.RandomState(seed)
    members = [np.where(labels.numpy() == c)[0] for c in range(len(counts))]
    drawn = [generator.choice(each, count, replace=False) for each, count in zip(members, counts, strict=True)]
    return torch.from_numpy(np.concatenate(drawn))


_RULES = {
    "balanced": balanced,
    "proportional": seeded,
    "first_k": lambda labels, counts, seed: first_per_class(labels, counts),
    "first_percent": lambda labels, counts, seed: first_per_class(labels, counts, by_class=True),
    "usb": lambda labels, counts, seed: usb_split(labels, counts, seed)[0],
    "torchssl": torchssl_split,
}
