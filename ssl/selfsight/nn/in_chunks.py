"""A network on a large batch, a few images at a time: the memory of a few, the gradient of all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfsight.nn.batchnorm import frozen_statistics


class InChunks:
    """A method of a network, for at most ``size`` images at a time, with exact gradients in two passes.

    The first pass keeps the outputs alone, of all images, from which a loss is worked out that may compare them with
    each other. On the way back each chunk goes through the network again, with the same random numbers, and takes its
    rows of the outputs' gradient with it (gradient caching: Gao, Zhang, Han and Callan 2021, arXiv:2101.06983). That is
    the gradient of the whole batch where an image's output depends on no other image. BatchNorm normalises each chunk
    by itself; its running statistics move with each, once.

    Args:
        whole: from ``[B, ...]`` to ``[B, ...]``. network: that it belongs to.
    """

    def __init__(self, whole: Callable[[Tensor], Tensor], network: nn.Module, size: int) -> None:
        self.whole, self.network, self.size = whole, network, size

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[[Tensor], Tensor]:
        return copy.deepcopy(self.whole, memo)  # of a teacher, which is not trained

    def __call__(self, x: Tensor) -> Tensor:
        chunks = x.split(self.size)
        if len(chunks) == 1:
            return self.whole(x)
        if not torch.is_grad_enabled():
            return torch.cat([self.whole(chunk) for chunk in chunks])
        return torch.cat(
            [checkpoint(self.whole, chunk, use_reentrant=False, context_fn=self._contexts) for chunk in chunks]
        )

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """What surrounds the first pass, and the second."""
        return contextlib.nullcontext(), frozen_statistics(self.network)


def in_chunks(network: nn.Module, size: int) -> None:
    """Let both entries of a backbone, the call and ``forward_features``, take at most ``size`` images at a time."""
    for entry in ("forward", "forward_features"):
        if hasattr(network, entry):
            setattr(network, entry, InChunks(getattr(network, entry), network, size))
