"""The few collective operations the methods need. On one process every one of them is the identity."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=365)  #: of processes that wait for one of them


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class PatientBarrier:
    """A place at which all processes wait for the slowest of them, however long it takes.

    A collective of the default group gives up after its timeout (PyTorch: 10 minutes on GPUs), and an evaluation by the
    first process alone may take longer. A process that has ended is noticed at once all the same.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def begin(self) -> None:
        """Connect the processes, all of which have to be here, so that one that ends while others wait is noticed."""
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[assignment]

    def wait(self) -> None:
        """Come back when all processes are here."""
        self.begin()
        if self._group is not None:
            dist.barrier(group=self._group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_without_grad(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Concatenate ``x`` of all ranks in rank order; the gradient is exact.

    The backward pass sums the gradients all ranks have for this rank's rows. With the mean over ranks that data
    parallel training takes afterwards, a loss averaged over local anchors gives the update of one process that holds
    the whole batch.

    Args:
        x: ``[B, ...]``, equal shape on every rank.
    Returns:
        ``[W B, ...]``; ``x`` itself on one process.
    """
    return _Gather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def gather_without_grad(x: Tensor) -> Tensor:
    """`gather` for targets, labels, indices and queues: nothing flows back."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, without gradient; ``x`` is left as it is."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` over all ranks; the gradient is exact.

    Every rank holds the same sum, so a loss made of it is the same on all of them, and the backward pass adds up what
    all of these losses say. With the mean over ranks that data parallel training takes afterwards, this is the update
    of one process that holds the whole batch.
    """
    return _Sum.apply(x) if world_size() > 1 else x


def mean_count(chosen: Tensor) -> Tensor:
    """What a process divides its sum over the ``chosen`` (bool) by, so that its mean with the others' is that over all.

    Rows that count may be spread unevenly over processes. Where there are none at all, no quotient is infinite.
    """
    return all_reduce_sum(chosen.sum()).clamp(min=1) / world_size()


@torch.no_grad()
def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum of ``x`` over ranks, without gradient; ``x`` is left as it is."""
    if world_size() == 1:
        return x.detach()
    largest = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


@torch.no_grad()
def exchange(x: Tensor, order: Tensor) -> Tensor:
    """This rank's share of the gathered rows in another order; ``exchange(exchange(x, o), o.argsort())`` is ``x``.

    A teacher in train mode sees its batch shuffled over ranks, so that its BatchNorm statistics do not give away which
    images belong together.

    Args:
        x: ``[B, ...]``, equal shape on every rank. order: permutation of the ``W B`` rows, the same on every rank.
    """
    return gather_without_grad(x)[order].chunk(world_size())[rank()]
