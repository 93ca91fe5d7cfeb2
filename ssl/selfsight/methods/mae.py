"""MAE: masked modelling for vision transformers.

Three quarters of an image's patches are hidden. The encoder sees the visible ones alone, which makes it fast; a narrow
decoder gets its tokens, a learnt vector in place of every hidden patch, and predicts the pixels there. Afterwards the
encoder is an ordinary transformer on all patches. For convolutional networks SparK does the same.

    He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arXiv:2111.06377.
    Code: facebookresearch/mae.

Follows the code: the number of visible patches is cut, not rounded; a patch's variance is the unbiased one; class token
and mask token are decayed. Deviation: the loss is float32 under mixed precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.mae import masked_pixels
from selfsight.methods.base import Method
from selfsight.nn.mae_decoder import MAEDecoder
from selfsight.nn.patches import RandomPatches, keep_count, random_patches
from selfsight.nn.vit import is_vit, visible_tokens
from selfsight.validation import SHARE, SWITCH, takes, whole

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Masked(NamedTuple):
    """What a masked forward gives: tokens ``[B, prefix + keep, D]``, predictions ``[B, L, p p C]``, and the patches."""

    tokens: Tensor
    prediction: Tensor
    patches: RandomPatches


@takes(
    mask_ratio=SHARE,
    decoder_dim=whole(1),
    decoder_depth=whole(1),
    decoder_heads=whole(1),
    normalise_pixels=SWITCH,
)
class MAE(Method):
    """Masked autoencoder: from the visible patches of an image the pixels of the hidden ones are predicted.

    Args:
        backbone: network to be trained, a vision transformer.
        mask_ratio: share of hidden patches.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: attention heads of a block.
        normalise_pixels: predict pixels normalised per patch, or the pixels themselves.

    Raises:
        UserError: a backbone that is no vision transformer, patches that do not fill the image, or a ratio that hides
            all of them or none.
    """

    n_views = (1, 1)
    decay_places = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_pixels: bool = True,
    ) -> None:
        super().__init__(backbone)
        vit = transformer(backbone)
        (height, width), (p, _) = vit.patch_embed.img_size, vit.patch_embed.patch_size
        if height % p or width % p:
            raise UserError(
                f"MAE got patches of {p} pixels for images of {height} x {width}, which they do not fill; choose a "
                "backbone.patch_size that divides both sides."
            )
        grid: tuple[int, int] = vit.patch_embed.grid_size
        self.length, self.mask_ratio = grid[0] * grid[1], mask_ratio
        self.keep = keep_count(self.length, mask_ratio)
        if not 0 < self.keep < self.length:
            raise UserError(
                f"MAE's mask_ratio {mask_ratio} leaves {self.keep} of {self.length} patches visible; it has to leave "
                "some and hide some: choose another ratio, larger images or smaller patches."
            )
        self.normalise_pixels = normalise_pixels
        self.decoder = MAEDecoder(
            vit.num_features, grid, p * p * vit.patch_embed.proj.in_channels, dim=decoder_dim, depth=decoder_depth,
            heads=decoder_heads, prefix=vit.num_prefix_tokens,
        )  # fmt: skip

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x = self.fitting(batch.views[0])  # [B, C, H, W]
        result = self.reconstruct(x, self.draw_noise(x))
        loss = masked_pixels(result.prediction, x, result.patches.mask, normalise=self.normalise_pixels)
        return {"loss": loss, "prediction_std": result.prediction.detach().float().std()}

    def reconstruct(self, x: Tensor, noise: Tensor) -> Masked:
        """The masked forward: the patches of smallest ``noise [B, L]`` are visible."""
        patches = random_patches(noise, self.keep)
        tokens = visible_tokens(transformer(self.backbone), x, patches.visible)  # [B, prefix + keep, D]
        return Masked(tokens, self.decoder(tokens, patches.restore), patches)

    def fitting(self, x: Tensor) -> Tensor:
        """The images themselves.

        Raises:
            UserError: they are not of the size that the backbone and the decoder's positions were made for.
        """
        size = transformer(self.backbone).patch_embed.img_size
        if tuple(x.shape[-2:]) != tuple(size):
            raise UserError(
                f"MAE got images of {x.shape[-2]} x {x.shape[-1]} and was made for {size[0]} x {size[1]}; set "
                "backbone.img_size to the size of the view."
            )
        return x

    def check_side(self, side: int) -> None:
        self.fitting(torch.empty(1, 3, side, side, device="meta"))

    def draw_noise(self, x: Tensor) -> Tensor:
        """``[B, L]`` in [0, 1)."""
        return torch.rand(len(x), self.length, device=x.device)

    def chance_loss(self) -> float | None:
        """A prediction of zeros: ``(n - 1) / n`` with n normalised numbers a patch; none where pixels are predicted."""
        n = self.decoder.pred.out_features
        return (n - 1) / n if self.normalise_pixels else None


def transformer(backbone: nn.Module) -> VisionTransformer:
    """The backbone, which is a vision transformer.

    Raises:
        UserError: it is none, or one that takes its patches from the maps of a convolutional network.
    """
    if is_vit(backbone) and hasattr(backbone.patch_embed, "backbone"):
        raise UserError(
            "MAE hides patches of pixels, and this network makes its patches of the maps of a convolutional one; "
            "choose backbone=vit_base_mae or another vit_* without _r in its name."
        )
    if not is_vit(backbone):
        raise UserError(
            f"MAE hides patches of a vision transformer, and the backbone is a {type(backbone).__name__}; choose "
            "backbone=vit_base_mae or another vit_*, or method=spark for a convolutional network."
        )
    return cast("VisionTransformer", backbone)
