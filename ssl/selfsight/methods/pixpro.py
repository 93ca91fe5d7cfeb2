"""PixPro: pixels of two views that show the same place should agree.

Two crops of an image come with their places in it, so that pixels of their last feature maps can be paired. The
online network propagates every pixel to the pixels like it; the result has to match the pixel of the other view in a
slowly moving target network. There are no negatives: the propagation is what prevents collapse.

    Xie, Lin, Zhang, Cao, Lin, Hu: Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
    Representation Learning. CVPR 2021, arXiv:2011.10043. Code: zdaxie/PixPro.

Follows the code where the paper differs: a hidden width of 4096, unit values in the propagation, pairs strictly nearer
than the threshold, a factor 2 in the loss, images without pairs counted as 0, and an instance branch with a predictor
in place of contrast. Deviations: the target's momentum follows the optimiser's steps, also after a resume (the authors'
counter starts anew); the instance branch averages maps of any size; widths follow the backbone. ``loss=pixcontrast`` is
the paper's section 3.1, which the authors did not release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.interface import feature_map, freeze_beyond_the_map
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.pixpro import instance_consistency, pixel_consistency, pixel_contrast, positives
from selfsight.methods.base import Method
from selfsight.nn.boxes import corners
from selfsight.nn.ema import EMATeacher
from selfsight.nn.heads import mlp, pointwise_conv
from selfsight.nn.precision import float32
from selfsight.nn.propagation import PixelPropagation
from selfsight.validation import SWITCH, above, at_least, one_of, takes, whole

LOSSES = ("pixpro", "pixcontrast")


@takes(
    hidden_dim=whole(1), dim=whole(1), loss=one_of(*LOSSES), exponent=at_least(0), clamp=at_least(0),
    transform_layers=whole(0), normalise_value=SWITCH, pos_ratio=at_least(0), skip_empty=SWITCH, temperature=above(0),
    instance_weight=at_least(0), decay=one_of("all", "kernels"),
)  # fmt: skip
class PixPro(Method):
    """Pixel-level consistency: pixels of two views that show one place agree, after propagation to pixels like them.

    Defaults are the authors' for ImageNet. The momentum of the target network is the scheduled value
    ``teacher_momentum``.

    Args:
        backbone: network to be trained; needs ``forward_features``.
        hidden_dim: hidden width of the projector (two 1x1 convolutions).
        dim: C of the projections.
        loss: ``pixpro`` (consistency after propagation) or ``pixcontrast`` (contrast of projections).
        exponent: of the similarities in the propagation, see `PixelPropagation`.
        clamp: lowest similarity there.
        transform_layers: of the propagation's transform.
        normalise_value: unit values in the propagation (the authors' code); False: the paper's equation as it reads.
        pos_ratio: T, the distance below which pixels are a pair, in diagonals of the larger pixel.
        skip_empty: leave images without pairs out of the mean.
        temperature: of ``pixcontrast``.
        instance_weight: alpha of the instance branch, which helps classification; 0 leaves it out.
        decay: ``kernels`` (weight decay and layer adaptation spare biases and BatchNorm) or ``all``.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, 2)
    schedules = ("teacher_momentum",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 4096,
        dim: int = 256,
        loss: Literal["pixpro", "pixcontrast"] = "pixpro",
        exponent: float = 2.0,
        clamp: float = 0.0,
        transform_layers: int = 1,
        normalise_value: bool = True,
        pos_ratio: float = 0.7,
        skip_empty: bool = False,
        temperature: float = 0.3,
        instance_weight: float = 0.0,
        decay: Literal["kernels", "all"] = "kernels",
    ) -> None:
        super().__init__(backbone)
        self.loss, self.pos_ratio, self.skip_empty, self.temperature = loss, pos_ratio, skip_empty, temperature
        self.instance_weight, self.decay = instance_weight, decay
        width = cast(int, backbone.num_features)
        freeze_beyond_the_map(backbone)

        self.projector = _head(width, hidden_dim, dim)
        self.target_backbone = EMATeacher(backbone, buffers="keep")
        self.target_projector = EMATeacher(self.projector, buffers="keep")
        if loss == "pixpro":
            self.propagation = PixelPropagation(
                dim, exponent=exponent, clamp=clamp, layers=transform_layers, normalise_value=normalise_value
            )
        if instance_weight > 0:
            self.instance_projector = _head(width, hidden_dim, dim)
            self.instance_predictor = _head(dim, hidden_dim, dim)
            self.target_instance_projector = EMATeacher(self.instance_projector, buffers="keep")

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        c1, c2 = self.places(batch)  # [B, 4] each
        f = [self.dense(v) for v in batch.views]  # [B, F, h, w] each
        x = [self.projector(m) for m in f]  # [B, C, h, w]
        f_k, k = self.target(batch.views)  # without gradient

        A = positives(c1, c2, self.map_size(f), pos_ratio=self.pos_ratio)  # [B, hw, hw], its transpose for (2, 1)
        q = [unit(self.propagation(m) if self.loss == "pixpro" else m) for m in x]  # [B, C, h, w]
        loss = self.pixel_loss(q[0], k[1], A) + self.pixel_loss(q[1], k[0], A.transpose(1, 2))
        found = self.monitors(x[0], q[0], k[1], A)
        if self.instance_weight > 0:
            instance = self.instance_loss(f, f_k)
            found |= {"loss_pixel": loss.detach(), "loss_instance": instance.detach()}
            loss = loss + self.instance_weight * instance
        return {"loss": loss, **found}

    def pixel_loss(self, q: Tensor, k: Tensor, A: Tensor) -> Tensor:
        """The loss of one direction: unit maps ``[B, C, h, w]``, online against target, and their pairs."""
        if self.loss == "pixpro":
            return pixel_consistency(q, k, A, skip_empty=self.skip_empty)
        return pixel_contrast(q, k, A, temperature=self.temperature, skip_empty=self.skip_empty) / 2

    def instance_loss(self, f: list[Tensor], f_k: list[Tensor]) -> Tensor:
        """The instance branch on the maps ``[B, F, h, w]`` of the online and of the target backbone."""
        a = [unit(pool(self.instance_predictor(self.instance_projector(m)))) for m in f]  # [B, C]
        b = [unit(pool(self.target_instance_projector(m))) for m in f_k]
        return instance_consistency(a[0], b[1]) + instance_consistency(a[1], b[0])

    @torch.no_grad()
    def target(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps ``[B, F, h, w]`` of the target backbone, and unit projections of them."""
        f = [feature_map(self.target_backbone.module, v) for v in views]
        return f, [unit(self.target_projector(m)) for m in f]

    def before_step(self) -> None:
        """The target moves before the step, so that a momentum m_k meets the weights of step k."""
        momentum = self.scheduled["teacher_momentum"]
        self.target_backbone.update(self.backbone, momentum)
        self.target_projector.update(self.projector, momentum)
        if self.instance_weight > 0:
            self.target_instance_projector.update(self.instance_projector, momentum)

    def dense(self, view: Tensor) -> Tensor:
        """The last feature map ``[B, F, h, w]``: what PixPro trains, and what dense evaluation reads."""
        return feature_map(self.backbone, view)

    def places(self, batch: Batch) -> list[Tensor]:
        if batch.boxes is None:
            raise UserError(
                "PixPro pairs pixels by the places of the views in their images, and these views come without; take "
                "views whose crop is 'resized', such as views=pixpro."
            )
        return [corners(boxes) for boxes in batch.boxes]

    def map_size(self, f: list[Tensor]) -> tuple[int, int]:
        sizes = [(m.shape[2], m.shape[3]) for m in f]
        if sizes[0] != sizes[1] or sizes[0] == (1, 1):
            raise UserError(
                f"PixPro got feature maps of {sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]} pixels; "
                "it needs two of one size and more than one pixel: larger views, or a backbone of smaller stride "
                "(backbone.stem=cifar)."
            )
        return sizes[0]

    @torch.no_grad()
    def monitors(self, x: Tensor, q: Tensor, k: Tensor, A: Tensor) -> dict[str, Tensor]:
        """What the loss does not tell.

        ``projection_std``: spread of the unit projections, 1 on the whole sphere, near 0 when all pixels have
        collapsed. ``positives``: mean number of pairs of an image. ``empty``: share of images without any.
        ``correspondence``: share of pixels with a pair whose most similar pixel in the other view is one.
        """
        u = unit(x).transpose(0, 1).flatten(1)  # [C, B hw]
        similarity = q.flatten(2).transpose(1, 2) @ k.flatten(2)  # [B, hw, hw]
        hit = A.gather(2, similarity.argmax(2, keepdim=True)).sum()
        return {
            "projection_std": u.std(dim=1).mean() * len(u) ** 0.5,
            "positives": A.sum((1, 2)).float().mean(),
            "empty": (~A.any(2).any(1)).float().mean(),
            "correspondence": hit / A.any(2).sum().clamp(min=1),
        }


def unit(x: Tensor) -> Tensor:
    return F.normalize(float32(x), dim=1)


def pool(x: Tensor) -> Tensor:
    return float32(x).mean((2, 3))


def _head(width: int, hidden_dim: int, dim: int) -> nn.Sequential:
    return mlp([width, hidden_dim, dim], norm=nn.BatchNorm2d, linear=pointwise_conv)
