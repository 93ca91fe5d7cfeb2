"""timm's vision transformer with the positions and first weights of MoCo v3, MAE and DINO.

Names of weights are timm's, which are the authors'. What differs from timm's own ``vit_*`` is how the weights start,
whether positions are learned, how they are resized, and that MoCo v3's small one has twelve heads. Arguments of
`timm.models.vision_transformer.VisionTransformer` (``img_size``, ``patch_size``, ``embed_dim``, ``depth``, ...) change
the rest.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.positions import ResizeRule, resize_positions, sincos_2d

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}


class ResizingViT(VisionTransformer):
    """With ``dynamic_img_size`` positions are resized by a paper's rule in place of timm's; see `resize_positions`."""

    resize_rule: ResizeRule = "size"

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches ``[B, h, w, D]``, or ``[B, L, D]`` without ``dynamic_img_size``, to all tokens with positions."""
        if x.ndim == 3:
            return super()._pos_embed(x)
        (h, w), patch = x.shape[1:3], self.patch_embed.patch_size[0]
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        assert self.pos_embed is not None, "these networks know places by them alone"
        positions = resize_positions(
            self.pos_embed, (h * patch, w * patch), patch, rule=self.resize_rule, prefix=prefix
        )
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*tokens, patches + positions], dim=1))
        return self.pos_drop(torch.cat([*tokens, patches], dim=1) + positions)


class DINOViT(ResizingViT):
    """Class token, positions and linear layers start normal with std 0.02."""

    resize_rule = "dino"

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)


class MAEViT(ResizingViT):
    """Fixed sines and cosines as positions, the column first; linear layers and the patch projection start as Xavier's
    uniform, the class token normal with std 0.02.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        _fixed_positions(self, "column")
        xavier(self)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)


class MoCoViT(ResizingViT):
    """Fixed sines and cosines as positions, the row first; linear layers start as Xavier's uniform, query, key and
    value each by itself, and so does the patch projection; the class token normal with std 1e-6.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        _fixed_positions(self, "row")
        xavier(self)
        blocks: Any = self.blocks
        for block in blocks:
            qkv, D = block.attn.qkv.weight, self.embed_dim
            nn.init.uniform_(qkv, -math.sqrt(6 / (2 * D)), math.sqrt(6 / (2 * D)))
        projection = self.patch_embed.proj
        if isinstance(projection, nn.Conv2d):
            bound = math.sqrt(6 / (projection.weight[0].numel() + self.embed_dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)


class ConvStem(PatchEmbed):
    """Four 3x3 convolutions of stride 2 with BatchNorm and ReLU, then 1x1, in place of one 16x16 of stride 16."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        if self.patch_size != (16, 16):
            raise UserError(f"A convolutional stem has patches of 16 pixels; patch_size is {patch_size}.")
        if embed_dim % 8:
            raise UserError(f"A convolutional stem needs a width that divides by 8; embed_dim is {embed_dim}.")
        layers: list[nn.Module] = []
        width = in_chans
        for out in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1))  # type: ignore[assignment]


def xavier(module: nn.Module) -> None:
    """Xavier's uniform for every linear layer, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _fixed_positions(vit: VisionTransformer, first: Any) -> None:
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = sincos_2d(vit.patch_embed.grid_size, vit.embed_dim, first=first, prefix=prefix)
    assert vit.pos_embed is not None, "made without positions"
    vit.pos_embed.data.copy_(table)
    vit.pos_embed.requires_grad_(False)


# --- by name ----------------------------------------------------------------------------------------------------------

_CONFIG = {"input_size": (3, 224, 224), "first_conv": "patch_embed.proj", "classifier": "head"}
_NAMES = [f"vit_{size}_dino" for size in ("tiny", "small", "base")]
_NAMES += [f"vit_{size}_mae" for size in ("tiny", "base", "large", "huge")]
_NAMES += [f"vit_{size}_moco" for size in ("tiny", "small", "base", "conv_small", "conv_base")]
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, _CONFIG))


def _build(kind: type[VisionTransformer], name: str, pretrained: bool, **options: Any) -> VisionTransformer:
    norm = partial(nn.LayerNorm, eps=1e-6)
    net: VisionTransformer = build_model_with_cfg(kind, name, pretrained, **{"norm_layer": norm, **options})
    return net


@register_model
def vit_tiny_dino(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-Ti/16 as DINO trains it, for crops of several sizes."""
    return _build(DINOViT, "vit_tiny_dino", pretrained, **{**TINY, "dynamic_img_size": True, **options})


@register_model
def vit_small_dino(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-S/16 as DINO trains it, for crops of several sizes; ``patch_size=8`` makes S/8."""
    return _build(DINOViT, "vit_small_dino", pretrained, **{**SMALL, "dynamic_img_size": True, **options})


@register_model
def vit_base_dino(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-B/16 as DINO trains it, for crops of several sizes; ``patch_size=8`` makes B/8."""
    return _build(DINOViT, "vit_base_dino", pretrained, **{**BASE, "dynamic_img_size": True, **options})


@register_model
def vit_tiny_mae(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-Ti/16 with MAE's positions and first weights."""
    return _build(MAEViT, "vit_tiny_mae", pretrained, **{**TINY, **options})


@register_model
def vit_base_mae(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-B/16 as MAE trains it."""
    return _build(MAEViT, "vit_base_mae", pretrained, **{**BASE, **options})


@register_model
def vit_large_mae(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-L/16 as MAE trains it."""
    return _build(MAEViT, "vit_large_mae", pretrained, **{**LARGE, **options})


@register_model
def vit_huge_mae(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-H/14 as MAE trains it."""
    return _build(MAEViT, "vit_huge_mae", pretrained, **{**HUGE, "patch_size": 14, **options})


@register_model
def vit_tiny_moco(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-Ti/16 with MoCo v3's positions and first weights."""
    return _build(MoCoViT, "vit_tiny_moco", pretrained, **{**TINY, **options})


@register_model
def vit_small_moco(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-S/16 as MoCo v3 trains it, with twelve heads."""
    return _build(MoCoViT, "vit_small_moco", pretrained, **{**SMALL, "num_heads": 12, **options})


@register_model
def vit_base_moco(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT-B/16 as MoCo v3 trains it."""
    return _build(MoCoViT, "vit_base_moco", pretrained, **{**BASE, **options})


@register_model
def vit_conv_small_moco(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """MoCo v3's ViT-S with a convolutional stem in place of the patch projection and of one block."""
    small = {**SMALL, "num_heads": 12, "depth": 11, "embed_layer": ConvStem}
    return _build(MoCoViT, "vit_conv_small_moco", pretrained, **{**small, **options})


@register_model
def vit_conv_base_moco(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """MoCo v3's ViT-B with a convolutional stem in place of the patch projection and of one block."""
    return _build(
        MoCoViT, "vit_conv_base_moco", pretrained, **{**BASE, "depth": 11, "embed_layer": ConvStem, **options}
    )
