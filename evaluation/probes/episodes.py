"""Few-shot episodes: small classification problems drawn from the test classes, solved by the nearest class mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.evaluation.features import Features, checked
from selfsight.evaluation.probes.linear import per_class
from selfsight.nn.sphere import directions
from selfsight.validation import takes, whole


@takes(ways=whole(2), shots=whole(1), queries=whole(1), episodes=whole(1), seed=whole(0))
@dataclass(frozen=True)
class Episodes:
    """``ways`` classes, ``shots`` labelled and ``queries`` unlabelled test images of each, many times over.

    A query goes to the class whose mean of L2-normalised features is nearest by cosine (Wang et al. 2019, *SimpleShot*,
    without centring).
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    episodes: int = 600
    seed: int = 0
    needs_labels = True

    @property
    def protocol(self) -> str:
        return (
            f"{self.episodes} episodes of {self.ways} test classes, {self.shots} labelled and {self.queries} queried "
            "images each, nearest class mean by cosine; mean with 95 % interval"
        )

    def __call__(self, train: Features, test: Features) -> dict[str, dict[str, float]]:
        """``{"episodes_<ways>way_<shots>shot": {"mean", "std", "interval"}}``."""
        _, test = checked(train, test)
        x, labels = directions(test.x), test.known_labels
        sizes = torch.bincount(labels)
        usable = (sizes >= self.shots + self.queries).nonzero()[:, 0]
        if len(usable) < self.ways:
            raise UserError(
                f"Episodes take {self.ways} classes with {self.shots + self.queries} test images each, and this set "
                f"has {len(usable)} such classes: lower ways, shots or queries."
            )
        scores = torch.tensor([self._episode(x, labels, usable, self.seed + i) for i in range(self.episodes)])
        std = float(scores.std(correction=0))
        summary = {"mean": float(scores.mean()), "std": std, "interval": 1.96 * std / math.sqrt(self.episodes)}
        return {f"episodes_{self.ways}way_{self.shots}shot": summary}

    def _episode(self, x: Tensor, labels: Tensor, usable: Tensor, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        chosen = usable[torch.randperm(len(usable), generator=generator)[: self.ways].to(usable.device)]
        renamed = labels.new_full((int(labels.max()) + 1,), -1)
        renamed[chosen] = torch.arange(self.ways, device=labels.device)
        rows = (renamed[labels] >= 0).nonzero()[:, 0]
        rows = rows[per_class(renamed[labels[rows]], self.shots + self.queries, seed)]  # grouped by class
        drawn = x[rows].view(self.ways, self.shots + self.queries, -1)
        means = directions(drawn[:, : self.shots].mean(dim=1))
        guessed = (drawn[:, self.shots :] @ means.T).argmax(dim=2)  # [ways, queries]
        return float((guessed == torch.arange(self.ways, device=x.device)[:, None]).double().mean())
