"""Distribution alignment: pseudo-labels are to name the classes as often as these occur.

A batch is aligned by running means that have taken it in, with the batches of its optimiser step before it. SimMatchV2,
which aligns by the mean as it was before the step, has its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfsight.nn.precision import full_precision
from selfsight.nn.step_state import StepState

#: see `Method.across_images`
ALIGNED = "pseudo-labels are aligned by means over the batches of the step so far"


class Alignment(StepState):
    """Distribution alignment with running means: ``p_c = norm(q_c (target_c + eps) / (model_c + eps))``.

    A batch is aligned by the state that has taken it in, with the batches of its step before it; the state starts at
    the first step's mean (USB's form; SimMatchV2 has another).

    Args:
        momentum: of the running means.
        target: ``[C]`` class distribution to align to; None is uniform.
        follow: the target itself is a running mean of the probabilities of labelled images.

    Attributes:
        model: ``[C]`` running mean of the unlabelled probabilities. target: ``[C]``.
    """

    model: Tensor
    target: Tensor
    started: Tensor

    def __init__(
        self, num_classes: int, momentum: float, target: Tensor | None = None, *, follow: bool = False
    ) -> None:
        super().__init__()
        self.momentum, self.follow = momentum, follow
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.register_buffer("model", torch.zeros(num_classes))
        self.register_buffer("target", uniform if target is None else target.clone())
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @full_precision
    @torch.no_grad()
    def forward(self, q: Tensor, q_labelled: Tensor | None = None) -> Tensor:
        """``[M, C]`` to ``[M, C]``; ``q_labelled`` (``[B, C]``) is needed where the target follows."""
        means = {"mean": q.mean(0, keepdim=True)}  # [1, C]
        if self.follow:
            assert q_labelled is not None, "a target that follows the labelled images has to see them"
            means["labelled"] = q_labelled.mean(0, keepdim=True)
        model, target = self.moved(**self.collect(**means))
        return reweigh(q, target, model)

    def moved(self, mean: Tensor, labelled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`model` and `target` with the mean probabilities of a step's batches, ``[n, C]`` each, taken in."""
        mean = mean.mean(0)
        model = torch.where(self.started, torch.lerp(mean, self.model, self.momentum), mean)
        target = self.target if labelled is None else torch.lerp(self.target, labelled.mean(0), 1 - self.momentum)
        return model, target

    def take_in(self, mean: Tensor, labelled: Tensor | None = None) -> None:
        model, target = self.moved(mean, labelled)
        self.model.copy_(model)
        self.target.copy_(target)
        self.started.fill_(True)


class QueueAlignment(StepState):
    """Distribution alignment with a queue of the means of steps, averaged over its full length.

    A batch is aligned by the queue that has taken it in, with the batches of its step before it. The queue starts at
    zeros, which count in the average (USB for CoMatch and SimMatch: 32 rows, ``eps`` 1e-6; SimMatch on ImageNet: 256
    rows, ``eps`` 0, where the scale drops out).

    Attributes:
        queue: ``[length, C]`` means of the last steps. pointer: row of the next one.
    """

    queue: Tensor
    pointer: Tensor
    target: Tensor

    def __init__(self, num_classes: int, length: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("queue", torch.zeros(length, num_classes))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target", torch.full((num_classes,), 1 / num_classes))

    @full_precision
    @torch.no_grad()
    def forward(self, q: Tensor, q_labelled: Tensor | None = None) -> Tensor:
        """``[M, C]`` to ``[M, C]``."""
        queue = self.moved(**self.collect(mean=q.mean(0, keepdim=True)))
        return reweigh(q, self.target, queue.mean(0), self.eps)

    def moved(self, mean: Tensor) -> Tensor:
        """`queue` with the mean of a step's batches ``[n, C]`` in the place of the oldest row."""
        return self.queue.index_copy(0, self.pointer[None], mean.mean(0)[None].to(self.queue.dtype))

    def take_in(self, mean: Tensor) -> None:
        self.queue.copy_(self.moved(mean))
        self.pointer.add_(1).remainder_(len(self.queue))


class WindowAlignment(StepState):
    """Distribution alignment with the mean of the last steps' means (google-research/remixmatch: 128 of them).

    The window starts full of the uniform distribution and is used before it takes in the batch; with
    ``start="empty"`` it takes the batch in first and averages over what there is.

    Attributes:
        window: ``[length, C]`` means of the last steps. filled: rows that count. pointer: row of the next one.
    """

    window: Tensor
    filled: Tensor
    pointer: Tensor
    target: Tensor

    def __init__(
        self,
        num_classes: int,
        length: int,
        target: Tensor | None = None,
        *,
        start: Literal["uniform", "empty"] = "uniform",
    ) -> None:
        super().__init__()
        uniform = torch.full((num_classes,), 1 / num_classes)
        full = start == "uniform"
        self.register_buffer("window", (uniform if full else torch.zeros(num_classes)).repeat(length, 1))
        self.register_buffer("filled", torch.tensor(length if full else 0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target", uniform if target is None else target.clone())
        self.takes_in_first = not full

    @full_precision
    @torch.no_grad()
    def forward(self, q: Tensor, q_labelled: Tensor | None = None) -> Tensor:
        """``[M, C]`` to ``[M, C]``."""
        rows = self.collect(mean=q.mean(0, keepdim=True))
        return reweigh(q, self.target, self.moved(**rows) if self.takes_in_first else self.model)

    @property
    def model(self) -> Tensor:
        """``[C]``, the average of the window."""
        return self.window.sum(0) / self.filled.clamp(min=1)

    def moved(self, mean: Tensor) -> Tensor:
        """`model` with the mean of a step's batches ``[n, C]`` in the place of the oldest row."""
        window = self.window.index_copy(0, self.pointer[None], mean.mean(0)[None].to(self.window.dtype))
        return window.sum(0) / (self.filled + 1).clamp(max=len(window))

    def take_in(self, mean: Tensor) -> None:
        self.window.index_copy_(0, self.pointer[None], mean.mean(0)[None].to(self.window.dtype))
        self.pointer.add_(1).remainder_(len(self.window))
        self.filled.add_(1).clamp_(max=len(self.window))


def reweigh(q: Tensor, target: Tensor, model: Tensor, eps: float = 1e-6) -> Tensor:
    """``norm(q_c (target_c + eps) / (model_c + eps))``, rows of ``[M, C]`` summing to one."""
    p = q * (target + eps) / (model + eps)
    return p / p.sum(-1, keepdim=True)
