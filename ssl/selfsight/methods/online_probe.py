"""A classifier trained along the way, which the network it looks at does not notice."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.distributed import mean_count
from selfsight.nn.matryoshka import PrefixLinear
from selfsight.nn.precision import float32
from selfsight.optim.groups import l2_penalty


class OnlineProbe(PrefixLinear):
    """A linear classifier on detached features, trained by the method's own optimiser (google-research/simclr, tf2).

    A method that has one hands it what its step has found: ``return self.classifier.add_to(found, h, batch.labels)``.

    Args:
        width: of the features.
        num_classes: C.
        decay: L2 on its kernel, as a term of the loss; the optimiser is to leave it out.
    """

    def __init__(self, width: int, num_classes: int, decay: float) -> None:
        super().__init__(width, num_classes)
        self.decay = decay

    def add_to(self, found: Mapping[str, Tensor], h: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """What a training step found, with this classifier's loss in ``loss``, and ``online_accuracy``.

        Nothing flows back into the features. Without labels it stays as it was found.

        Args:
            found: ``loss`` and monitors of the step.
            h: features ``[V B, width]``, view by view.
            labels: ``[B]`` int64; images of -1 do not count.
        """
        if labels is None:
            return dict(found)
        y = labels.repeat(len(h) // len(labels))  # [V B]
        scores = float32(self(h.detach()))  # [V B, C]
        known = mean_count(y >= 0)
        loss = F.cross_entropy(scores, y, ignore_index=-1, reduction="sum") / known
        loss = found["loss"] + loss + l2_penalty([self.weight], self.decay)
        return {**found, "loss": loss, "online_accuracy": (scores.detach().argmax(1) == y).sum() / known}
