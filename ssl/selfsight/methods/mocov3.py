"""MoCo v3: queries find the keys of their images, for vision transformers and convolutional networks.

Both views pass the base encoder and a predictor, which gives queries, and a moving average of the encoder, which gives
keys. Each query has to find the key of its image's other view among those of the whole batch, on all devices; there is
no queue. Transformers train more steadily when the projection of their patches is left at random.

    Chen, Xie, He: An Empirical Study of Training Self-Supervised Vision Transformers. ICCV 2021, arXiv:2104.02057.
    Code: facebookresearch/moco-v3.

Follows the code: the average moves before the step, towards the weights the queries were made with, and keeps BatchNorm
statistics of its own. Deviation: it moves before the queries are computed, which gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError, nearest
from selfsight.losses.mocov3 import contrast
from selfsight.methods.base import Method
from selfsight.nn.collapse import embedding_std, refuse_frozen
from selfsight.nn.ema import EMATeacher
from selfsight.nn.heads import batch_norm_without_affine, mlp
from selfsight.validation import SWITCH, above, takes, whole

Heads = Literal["auto", "resnet", "vit"]


@takes(hidden_dim=whole(1), dim=whole(1), temperature=above(0), freeze_patches=SWITCH)
class MoCoV3(Method):
    """Momentum contrast, version 3: a query finds the key of its image among those of the batch.

    The average's momentum m is the scheduled value ``teacher_momentum``.

    Args:
        backbone: network to be trained.
        hidden_dim: width of the hidden layers of projector and predictor.
        dim: of queries and keys.
        temperature: tau; 1 for ResNet-50, 0.2 for transformers.
        heads: ``resnet`` (a projector of two layers, nothing after the predictor), ``vit`` (three layers, BatchNorm
            after the predictor), or ``auto``: what fits the backbone.
        freeze_patches: the projection of the patches stays at its first value. Networks with a convolutional stem, and
            those without patches, have nothing to freeze.
        decay: weight decay on ``all`` parameters (AdamW for transformers) or on ``kernels`` alone (LARS for ResNets).
            ``auto``: what fits the backbone.
    """

    n_views = (2, 2)
    across_images = "a query looks for its key among those of its batch"
    decay_places = True
    schedules = ("teacher_momentum",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 4096,
        dim: int = 256,
        temperature: float = 1.0,
        heads: Heads = "auto",
        freeze_patches: bool = True,
        decay: Literal["auto", "all", "kernels"] = "auto",
    ) -> None:
        super().__init__(backbone)
        refuse_frozen(backbone, "MoCo v3")
        if heads not in get_args(Heads):
            raise UserError(
                f"MoCo v3's heads are '{heads}'; one of {', '.join(get_args(Heads))}.{nearest(heads, get_args(Heads))}"
            )
        if decay not in ("auto", "all", "kernels"):
            raise UserError(
                f"MoCo v3's decay is '{decay}'; one of auto, all, kernels.{nearest(decay, ('auto', 'all', 'kernels'))}"
            )
        transformer = hasattr(backbone, "patch_embed")
        vit = transformer if heads == "auto" else heads == "vit"
        width: int = backbone.num_features  # type: ignore[assignment]
        self.temperature = temperature
        self.decay = ("all" if transformer else "kernels") if decay == "auto" else decay
        if freeze_patches:
            freeze_patch_projection(backbone)
        norm, last_norm = nn.BatchNorm1d, batch_norm_without_affine
        hidden = [hidden_dim] * (2 if vit else 1)
        self.projector = mlp(
            [width, *hidden, dim], norm=norm, last_norm=last_norm, bias=False, last_bias=False, of_features=True
        )
        self.predictor = mlp(
            [dim, hidden_dim, dim], norm=norm, last_norm=last_norm if vit else None, bias=False, last_bias=False
        )
        self.momentum_encoder = EMATeacher(self.base_encoder, buffers="keep")

    @property
    def base_encoder(self) -> nn.Sequential:
        """Backbone and projector, the part the momentum encoder is an average of."""
        return nn.Sequential(self.backbone, self.projector)

    def before_step(self) -> None:
        self.momentum_encoder.update(self.base_encoder, self.scheduled["teacher_momentum"])

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        q = [self.predictor(self.base_encoder(v)) for v in batch.views]  # [B, D] each: BatchNorm sees a view by itself
        with torch.no_grad():
            k = [self.momentum_encoder(v) for v in batch.views]  # [B, D] each
        loss = contrast(q[0], k[1], temperature=self.temperature) + contrast(q[1], k[0], temperature=self.temperature)
        return {"loss": loss, "key_std": embedding_std(k[0])}

    def chance_loss(self) -> float:
        """``4 tau ln N``: no query recognises its image among N; untrained, or collapsed."""
        return 4 * self.temperature * math.log(max(1, self.clock.batch_size))


def freeze_patch_projection(backbone: nn.Module) -> None:
    """Leave the projection of a transformer's patches as it is, where it is a single convolution."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d):
        projection.requires_grad_(False)
