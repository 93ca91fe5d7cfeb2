"""State that moves once an optimiser step, of however many batches the step is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selfsight.nn.distributed import gather_without_grad


class StepState(nn.Module):
    """A module whose buffers take in what a step's batches bring, all at once, after the optimiser's step.

    Each batch hands its rows to `collect`; `commit` gives those of all batches and all processes to `take_in`, in their
    order, as if they had been one batch. What has to be known of the state before that is worked out from the rows that
    `collect` returns: those of the step so far.
    A subclass that collects has a method ``take_in``, with the names of its rows as arguments, ``[N, ...]`` each.
    """

    take_in: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        self._collected: dict[str, list[Tensor]] = {}

    def collect(self, **rows: Tensor) -> dict[str, Tensor]:
        """Note rows ``[n, ...]`` by name; returns those of this step so far, of all processes, ``[N, ...]`` each."""
        for name, value in rows.items():
            self._collected.setdefault(name, []).append(gather_without_grad(value))
        return {name: torch.cat(self._collected[name]) for name in rows}

    @torch.no_grad()
    def commit(self) -> None:
        """Take in what has been collected, if anything has."""
        collected, self._collected = self._collected, {}
        if collected:
            self.take_in(**{name: torch.cat(parts) for name, parts in collected.items()})

    def discard(self) -> None:
        """Forget what has been collected: the step it was for does not come to its end."""
        self._collected = {}

    def put_aside(self) -> dict[str, list[Tensor]]:
        """What has been collected, which is put aside for `put_back`; collecting begins anew."""
        aside, self._collected = self._collected, {}
        return aside

    def put_back(self, aside: dict[str, list[Tensor]]) -> None:
        """In place of what has been collected since."""
        self._collected = aside
