"""Which images each step of each process sees: a pure function of seed, epoch and step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.validation import expect, one_of, whole

SPLITS = ("batch", "block", "stride")
LASTS = ("drop", "keep", "fill")


@dataclass(frozen=True)
class Order:
    """The order of the images in every epoch, and how processes share it.

    Epoch ``e`` is a run of random permutations drawn one after the other from a CPU generator seeded with ``seed + e``
    (the rule of torch's DistributedSampler), cut to ``examples``. Nothing is remembered between steps, so a resumed run
    takes up the order exactly where it stopped.

    Attributes:
        images: size of the data set.
        batch_size: images per step over all processes.
        examples: images per epoch; None is one pass. More than ``images`` repeats them, each pass in a fresh order.
        last: what becomes of the incomplete last batch: ``drop``, ``keep`` (one process only), or ``fill`` with images
            from the start of the epoch's order.
        shuffle: False keeps the order of the data set.
        replacement: every image is drawn independently of the others (SimMatch's CIFAR loaders).
        split: how processes share an epoch. ``batch``: each takes its part of every batch, so that their union is
            the batch of one process. ``block``: each takes one contiguous part of the epoch (SparK).
            ``stride``: each takes every n-th image (SimMatchV2, USB).

    Raises:
        UserError: the batch is larger than an epoch, or an unknown ``split``.
    """

    images: int
    batch_size: int
    examples: int | None = None
    seed: int = 0
    last: str = "drop"
    shuffle: bool = True
    replacement: bool = False
    split: str = "batch"

    def __post_init__(self) -> None:
        expect("split of the order", self.split, one_of(*SPLITS))
        expect("last batch", self.last, one_of(*LASTS))
        expect("batch_size", self.batch_size, whole(1))
        if self.images < 1:
            raise UserError("the data set holds no image to draw from.")
        if self.steps < 1:
            raise UserError(
                f"batch_size is {self.batch_size} and an epoch has {self.length} images; "
                f"choose batch_size={self.length} or less."
            )

    @property
    def length(self) -> int:
        """Images of an epoch before the last batch is dropped or filled."""
        return self.images if self.examples is None else self.examples

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.length // self.batch_size if self.last == "drop" else -(-self.length // self.batch_size)

    def indices(self, epoch: int) -> Tensor:
        """Indices of the epoch, ``[length]`` (``last='fill'``: ``[steps * batch_size]``), int64."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.replacement:
            order = torch.randint(self.images, (self.length,), generator=generator)
        else:
            passes = -(-self.length // self.images)
            each = [
                torch.randperm(self.images, generator=generator) if self.shuffle else torch.arange(self.images)
                for _ in range(passes)
            ]
            order = torch.cat(each)[: self.length]
        missing = self.steps * self.batch_size - len(order) if self.last == "fill" else 0
        return torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]]) if missing > 0 else order

    def batches(self, epoch: int, rank: int = 0, world: int = 1) -> list[Tensor]:
        """Indices of one process, one ``[batch_size / world]`` per step (the last one shorter with ``last='keep'``).

        Raises:
            UserError: the batch cannot be shared evenly by ``world`` processes.
        """
        if self.batch_size % world:
            raise UserError(
                f"batch_size is {self.batch_size} over all devices and there are {world} processes; "
                f"choose a multiple of {world}."
            )
        order, local = self.indices(epoch), self.batch_size // world
        if world > 1 and self.split == "block":
            edges = torch.linspace(0, len(order), world + 1, dtype=torch.int)
            order = order[int(edges[rank]) : int(edges[rank + 1])]
        elif world > 1 and self.split == "stride":
            order = order[rank::world]
        elif world > 1:
            whole = self.length // self.batch_size if self.last != "fill" else self.steps
            order = order[: whole * self.batch_size].view(whole, world, local)[:, rank].flatten()
        batches = list(order.split(local))[: self.steps]
        return batches[:-1] if self.last == "drop" and len(batches[-1]) < local else batches


@dataclass
class Request:
    """One step of one process: ``indices`` of its images, and where in the run it stands.

    ``draws`` numbers every image ever drawn (over all processes), so that an image seen twice is augmented differently.
    """

    epoch: int
    step: int
    indices: list[int]
    draws: list[int]

    def parts(self, number: int) -> list[Request]:
        """The step in ``number`` requests of nearly as many images each, for as many processes."""
        edges = [len(self.indices) * k // number for k in range(number + 1)]
        return [
            Request(self.epoch, self.step, self.indices[a:b], self.draws[a:b]) for a, b in itertools.pairwise(edges)
        ]


def requests(order: Order, epoch: int, start: int, rank: int = 0, world: int = 1) -> Iterator[Request]:
    """The steps of one epoch from ``start`` on, for one process."""
    for step, batch in enumerate(order.batches(epoch, rank, world)[start:], start):
        first = (epoch * order.steps + step) * order.batch_size + rank * len(batch)
        yield Request(epoch, step, batch.tolist(), list(range(first, first + len(batch))))
