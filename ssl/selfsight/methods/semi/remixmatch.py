"""ReMixMatch (Berthelot et al., ICLR 2020, arXiv 1911.09785).

MixMatch with an anchor: the label of an unlabelled image is guessed from its weak view alone, brought to the
frequencies of the labelled classes and sharpened; its strong views are trained to give it. Labelled, strong and weak
images are mixed in pairs, the first strong view is learned unmixed as well, and a second head tells by how much it has
been turned.

As in microsoft/Semi-supervised-learning the mixing weight is one number a batch, two strong views stand for the paper's
eight, the running mean of predictions takes in the batch before it is used, and BatchNorm's running statistics come
from the first chunk of mixtures alone. ``align="window"`` is google-research/remixmatch's alignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.errors import UserError, nearest
from selfsight.losses.semi import cross_entropy, mix_up, sharpen
from selfsight.methods.semi.alignment import Alignment, WindowAlignment
from selfsight.methods.semi.mixmatch import MixMatch
from selfsight.nn.batchnorm import frozen_statistics
from selfsight.nn.matryoshka import PrefixLinear
from selfsight.nn.precision import float32
from selfsight.nn.rotate import rotate
from selfsight.optim.schedule import Ramp
from selfsight.validation import SHARE, above, at_least, takes, whole

ALIGNMENTS = ("ema", "window")


@takes(
    num_classes=whole(2),
    T=above(0),
    mixup_alpha=above(0),
    lambda_u=at_least(0),
    lambda_s=at_least(0),
    lambda_r=at_least(0),
    ramp=SHARE,
    m=SHARE,
    window=whole(1),
)
class ReMixMatch(MixMatch):
    """MixMatch with anchors from weak views, aligned guesses and a rotation head.

    Labelled and unlabelled batches have one size (``mu`` of 1).

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        T: sharpening temperature.
        mixup_alpha: of the Beta distribution the mixing weight comes from.
        lambda_u: final weight of mixed unlabelled images.
        lambda_s: final weight of the first strong view unmixed.
        lambda_r: weight of the rotations; 0 leaves them and their head out.
        ramp: share of the run in which lambda_u and lambda_s grow from 0.
        align: ``ema``, running means, or ``window``, the mean of the last steps.
        m: momentum of the running means.
        window: how many steps.
    """

    n_views: tuple[int, int | None] = (2, None)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        T: float = 0.5,
        mixup_alpha: float = 0.75,
        lambda_u: float = 1.5,
        lambda_s: float = 0.5,
        lambda_r: float = 0.5,
        ramp: float = 1 / 64,
        align: Literal["ema", "window"] = "ema",
        m: float = 0.999,
        window: int = 128,
    ) -> None:
        super().__init__(
            backbone, labels=labels, num_classes=num_classes, T=T, mixup_alpha=mixup_alpha, lambda_u=lambda_u, ramp=ramp
        )
        if align not in ALIGNMENTS:
            raise UserError(
                f"ReMixMatch's align is '{align}'; one of {', '.join(ALIGNMENTS)}.{nearest(align, ALIGNMENTS)}"
            )
        self.lambda_s, self.lambda_r = lambda_s, lambda_r
        frequencies = torch.bincount(labels, minlength=num_classes) / len(labels)
        self.alignment = (
            Alignment(num_classes, m, frequencies)
            if align == "ema"
            else WindowAlignment(num_classes, window, frequencies)
        )
        width: int = backbone.num_features  # type: ignore[assignment]
        self.rotation_head = PrefixLinear(width, 4) if lambda_r else None

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        x, weak, *strong = self.views(batch)
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        with torch.no_grad(), frozen_statistics(self):
            p = self.alignment(float32(self.logits(weak)).softmax(-1))
            p = sharpen(p, self.T)  # [M, C]
        B, images = len(x), torch.cat([x, *strong, weak])  # [B + (K + 1) M, ...]
        targets = torch.cat([F.one_hot(y, self.num_classes).to(p.dtype), *[p] * (len(strong) + 1)])
        weight, order = self.draw(len(images))
        logits = self.interleaved(mix_up(images, weight, order), B)
        targets = mix_up(targets, weight, order)
        L_x = cross_entropy(logits[:B], targets[:B])
        L_u = cross_entropy(logits[B:], targets[B:])
        with frozen_statistics(self):
            L_s = cross_entropy(self.logits(strong[0]), p)
            L_r = self.rotation_loss(strong[0])
        ramp = Ramp(0.0, 1.0, self.ramp)(self.step, self.clock)
        unlabelled = ramp * (self.lambda_u * L_u + self.lambda_s * L_s) + self.lambda_r * L_r
        terms = {"loss_sup": L_x, "loss_mixed": L_u, "loss_strong": L_s, "loss_rotation": L_r, "loss_unsup": unlabelled}
        everyone = self.monitors(torch.ones_like(p[:, 0]), p, batch.unlabelled)
        return {"loss": L_x + unlabelled, **{name: term.detach() for name, term in terms.items()}, **everyone}

    def rotation_loss(self, images: Tensor) -> Tensor:
        """By how much each image has been turned, to be told from its features; 0 without a head."""
        if self.rotation_head is None:
            return images.new_zeros(())
        turned, turns = self.turned(images)
        return cross_entropy(self.rotation_head(self.backbone(turned)), turns)

    def turned(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Each image by some quarter turns, and how many ``[M]``."""
        turns = torch.randint(4, (len(images),), device=images.device)
        every = torch.stack([rotate(images, k) for k in range(4)])  # [4, M, C, S, S]
        return every[turns, torch.arange(len(images), device=images.device)], turns
