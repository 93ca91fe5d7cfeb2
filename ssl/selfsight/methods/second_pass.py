"""A step's gradient, computed a second time at other weights, without a trace: what `selfsight.optim.SAM` asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from selfsight.errors import UserError
from selfsight.nn.batchnorm import restored_statistics
from selfsight.nn.step_state import StepState
from selfsight.optim.sam import RandomState, random_state, set_random_state


class SecondPass:
    """The batches of a step, kept to be gone through again, with the same random numbers.

    Nothing but gradients comes of the second time: running statistics rest, and what goes into queues, banks and means
    is what the first one brought.

    Attributes:
        begun: the gradients at hand are those of the second time.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[Any, int, RandomState]] = []
        self.begun = False

    def note(self, batch: Any, batch_idx: int, *, first: bool) -> None:
        """Keep a batch that is about to be learned from.

        Args:
            first: of its step.
        """
        self.begun = False
        self.batches = [*([] if first else self.batches), (batch, batch_idx, random_state())]

    def after(self, first: Callable[[], Any], method: StepState, trainer: Trainer) -> Callable[[], Any]:
        """What computes the gradient by ``first`` when it is called, and by `again` when it is called once more."""
        passes = iter((first, partial(self.again, method, trainer)))
        return lambda: next(passes)()

    def again(self, method: StepState, trainer: Trainer) -> None:
        """Give the parameters of ``method`` the gradient of all batches, as the trainer does.

        Raises:
            UserError: state of the method has moved, which is to move once a step.
        """
        self.begun = True
        strategy = trainer.strategy
        method.zero_grad()
        with restored_statistics(method), method.collecting_aside():
            before = _versions(method)
            for batch, batch_idx, state in self.batches:
                set_random_state(state)
                with nullcontext() if batch_idx == self.batches[-1][1] else _without_sync(strategy):
                    found: Any = strategy.training_step(batch, batch_idx)
                    strategy.backward(found["loss"] / trainer.accumulate_grad_batches, trainer.optimizers[0])
            moved = [name for name, version in _versions(method).items() if version != before.get(name)]
        if moved:
            raise UserError(
                f"optimizer.sam computes every batch twice, and {type(method).__name__} moves its '{moved[0]}' in "
                "training_step; let it note what a batch brings by collect(…) and move it in take_in(…), once a step."
            )


def _without_sync(strategy: Strategy) -> AbstractContextManager[Any]:
    """Gradients stay those of each process."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def _versions(method: StepState) -> dict[str, tuple[int, int]]:
    """Of every buffer that a method has for itself: which tensor it is, and how often that has been written to."""
    names = ((part, name, buffer) for part in method.states() for name, buffer in part.named_buffers(recurse=False))
    return {f"{type(part).__name__}.{name}": (id(buffer), buffer._version) for part, name, buffer in names}
