"""State that moves once an optimiser step, of however many batches the step is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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

    def states(self) -> Iterator[StepState]:
        """What has such state in this module, the module itself among it."""
        return (part for part in self.modules() if isinstance(part, StepState))

    def collected(self) -> list[dict[str, list[Tensor]]]:
        """What each of `states` has collected in this step so far."""
        return [{name: list(parts) for name, parts in part._collected.items()} for part in self.states()]

    @contextmanager
    def collecting_aside(self, so_far: Sequence[dict[str, list[Tensor]]] | None = None) -> Iterator[None]:
        """What any of `states` collects within is forgotten, and what was before stays: a step is gone over again.

        Args:
            so_far: what `collected` gave, and collecting goes on from within; None: nothing.
        """
        kept = [(part, part._collected) for part in self.states()]
        for i, (part, _) in enumerate(kept):
            part._collected = {} if so_far is None else {name: list(parts) for name, parts in so_far[i].items()}
        try:
            yield
        finally:
            for part, rows in kept:
                part._collected = rows
