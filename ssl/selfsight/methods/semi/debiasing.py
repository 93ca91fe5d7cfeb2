"""Debiased pseudo-labels: classes that a network names too often, whatever the images, are named less often.

    Wang, Wu, Lian, Yu: Debiased Learning from Naturally Imbalanced Pseudo-Labels. CVPR 2022, arXiv 2201.01490,
    section 3. Code: frank-xwang/debiased-pseudo-labeling.

As in the authors' code the guesses go by the running mean as it was before the batch, the margins by the one that has
taken it in; here with the batches of its optimiser step before it, of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.nn.step_state import StepState

#: see `Method.across_images`
DEBIASED = "margins follow the guesses of the step's batches so far"


class Debiasing(StepState):
    """``f(u) - lambda log p`` for weak views, whose classes are the guesses; ``f(v) + lambda log p`` for strong ones.

    ``p`` is the running mean of ``softmax(f(u))``, as the network gives it, over unlabelled images. The second form is
    the adaptive margin: a class that is named often has to be told from the others by more.

    Args:
        strength: lambda; 0.5 in the paper.
        momentum: of the running mean.

    Attributes:
        p: ``[C]``, uniform at first.
    """

    p: Tensor

    def __init__(self, num_classes: int, strength: float, momentum: float) -> None:
        super().__init__()
        self.strength, self.momentum = strength, momentum
        self.register_buffer("p", torch.full((num_classes,), 1 / num_classes))

    def forward(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of weak and of strong views, ``[M, C]`` each, to those that guess and those that learn the guesses."""
        with torch.no_grad():
            mean = weak.softmax(-1).mean(0, keepdim=True)  # [1, C]
            before, after = self.bias(self.p), self.bias(self.moved(**self.collect(mean=mean)))
        return weak - before.to(weak.dtype), strong + after.to(strong.dtype)

    def bias(self, p: Tensor) -> Tensor:
        """``lambda log p``, ``[C]``; finite for a class that is never named."""
        return self.strength * p.clamp(min=torch.finfo(p.dtype).tiny).log()

    def moved(self, mean: Tensor) -> Tensor:
        """`p` with the mean guesses of a step's batches ``[n, C]`` taken in."""
        return torch.lerp(mean.mean(0).to(self.p.dtype), self.p, self.momentum)

    def take_in(self, mean: Tensor) -> None:
        self.p.copy_(self.moved(mean))
