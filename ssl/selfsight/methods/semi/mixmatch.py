"""MixMatch (Berthelot et al., NeurIPS 2019, arXiv 1905.02249).

The label of an unlabelled image is the mean prediction for two weak views, sharpened. All images and labels are then
mixed in pairs; labelled mixtures are learned by cross-entropy, unlabelled ones by squared error, whose weight grows
linearly in the first part of the run.

As in microsoft/Semi-supervised-learning the mixing weight is one number a batch, and BatchNorm's running statistics
come from the chunk of labelled mixtures alone, after rows have been interleaved so that each chunk holds all kinds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.errors import UserError
from selfsight.losses.semi import cross_entropy, guess, interleave, mix_up, squared_error
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.nn.batchnorm import frozen_statistics
from selfsight.nn.precision import float32
from selfsight.optim.schedule import Ramp
from selfsight.validation import SHARE, above, at_least, takes, whole


@takes(num_classes=whole(2), T=above(0), mixup_alpha=above(0), lambda_u=at_least(0), ramp=SHARE)
class MixMatch(SemiMethod):
    """Guessed labels, sharpened, and pairs of images mixed with their labels.

    Labelled and unlabelled batches have one size (``mu`` of 1). Defaults are USB's for CIFAR-10; CIFAR-100 takes
    ``lambda_u=150``.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        T: sharpening temperature.
        mixup_alpha: of the Beta distribution the mixing weight comes from.
        lambda_u: final weight of the unlabelled loss.
        ramp: share of the run in which it grows from 0.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views: tuple[int, int | None] = (2, 2)
    across_images = "the images of a batch are mixed with each other"
    per_process = "each process mixes the images of its share"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        T: float = 0.5,
        mixup_alpha: float = 0.5,
        lambda_u: float = 100.0,
        ramp: float = 0.4,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes)
        self.T, self.mixup_alpha, self.lambda_u, self.ramp = T, mixup_alpha, lambda_u, ramp

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        x, u1, u2 = self.views(batch)
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        with torch.no_grad(), frozen_statistics(self):
            p = guess(torch.stack([self.logits(u1), self.logits(u2)]), self.T)  # [M, C]
        B, images = len(x), torch.cat([x, u1, u2])  # [B + 2 M, ...]
        targets = torch.cat([F.one_hot(y, self.num_classes).to(p.dtype), p, p])
        weight, order = self.draw(len(images))
        images, targets = mix_up(images, weight, order), mix_up(targets, weight, order)
        logits = self.interleaved(images, B)
        L_x = cross_entropy(logits[:B], targets[:B])
        L_u = squared_error(logits[B:], targets[B:])
        ramp = Ramp(0.0, 1.0, self.ramp)(self.step, self.clock)
        everyone = self.monitors(torch.ones_like(p[:, 0]), p, batch.unlabelled)
        terms = {"loss_sup": L_x.detach(), "loss_unsup": L_u.detach()}
        return {"loss": L_x + ramp * self.lambda_u * L_u, **terms, **everyone}

    def draw(self, rows: int) -> tuple[float, Tensor]:
        """Mixing weight, drawn on the host, and partner of each row."""
        beta = torch.distributions.Beta(self.mixup_alpha, self.mixup_alpha)
        return float(beta.sample()), torch.randperm(rows, device=self.device)

    def interleaved(self, images: Tensor, chunk: int) -> Tensor:
        """Logits by chunks of ``chunk`` rows, `interleave`d; the first chunk moves the statistics of BatchNorm."""
        if len(images) % chunk:
            raise UserError(
                f"{type(self).__name__} got {chunk} labelled and {len(images) - chunk} unlabelled views in a step; the "
                "second has to be a multiple of the first: set mu."
            )
        first, *others = interleave(images.unflatten(0, (-1, chunk)))
        logits = [self.logits(first)]
        with frozen_statistics(self):
            logits += [self.logits(part) for part in others]
        return interleave(float32(torch.stack(logits))).flatten(0, 1)
