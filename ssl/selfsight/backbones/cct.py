"""Compact convolutional transformers: a few thousand to a few million parameters, for small images and few of them.

Convolutions and pooling cut the image into tokens that overlap, a plain transformer follows, and a learnt weighting of
its tokens (sequence pooling) is the feature: no class token.

    Hassani, Walton, Shah, Abuduweili, Li, Shi: Escaping the Big Data Paradigm with Compact Transformers.
    arXiv:2104.05704. Code: SHI-Labs/Compact-Transformers.

A layer is the authors': what its MLP adds to is normalised, too. Dropout is left out; positions are learnt, and resized
for images of another size than ``img_size``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from timm.layers import DropPath, Mlp, resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class Layer(nn.Module):
    """``[B, N, D] -> [B, N, D]``."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.pre_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=heads, qkv_bias=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.drop_path(self.attn(self.pre_norm(x))))
        return x + self.drop_path(self.mlp(x))


class CCT(nn.Module):
    """``[B, in_chans, H, W] -> [B, dim]``, with timm's interface.

    Args:
        depth, dim, heads, mlp_ratio: of the transformer.
        kernel, convs: side of the tokeniser's convolutions, and how many of them, each with a pooling behind it.
        img_size: side of the images whose tokens have a position of their own.
        global_pool: ``seq`` (sequence pooling, the paper's) or ``avg`` (mean of the tokens).
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        mlp_ratio: float,
        kernel: int,
        convs: int,
        *,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "seq",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in ("seq", "avg"):
            raise ValueError(f"global_pool is '{global_pool}', and this network pools by 'seq' or 'avg'")
        stride = max(1, kernel // 2 - 1)
        widths = [in_chans, *[64] * (convs - 1), dim]
        layers: list[nn.Module] = []
        for wide_in, wide_out in itertools.pairwise(widths):
            conv = nn.Conv2d(wide_in, wide_out, kernel, stride, max(1, kernel // 2), bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.tokenizer = nn.Sequential(*layers)
        reduction = (2 * stride) ** convs
        self.grid = math.ceil(img_size / reduction)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.grid**2, dim), std=0.2))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Layer(dim, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)
        self.global_pool, self.num_features, self.num_prefix_tokens = global_pool, dim, 0
        self.attention_pool = nn.Linear(dim, 1) if global_pool == "seq" else None
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.reset_classifier(num_classes)
        self.apply(_start)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``[B, h w, dim]``."""
        x = self.tokenizer(x)  # [B, D, h, w]
        size = [x.shape[2], x.shape[3]]
        x = x.flatten(2).transpose(1, 2) + resample_abs_pos_embed(
            self.pos_embed, size, [self.grid, self.grid], num_prefix_tokens=0
        )
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, dim]`` of tokens ``[B, N, dim]``; logits where there are classes and ``pre_logits`` is off."""
        weights = 1 / x.shape[1] if self.attention_pool is None else self.attention_pool(x).softmax(dim=1)  # [B, N, 1]
        x = (weights * x).sum(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier; 0 classes: none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's: which parameters are a layer together."""
        return {"stem": r"^tokenizer|pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


#: name: depth, dim, heads, mlp_ratio, kernel, convs; side of the images it was published for
VARIANTS: dict[str, tuple[tuple[int, int, int, float, int, int], int]] = {
    "cct_2_3x2": ((2, 128, 2, 1, 3, 2), 32),
    "cct_4_3x2": ((4, 128, 2, 1, 3, 2), 32),
    "cct_6_3x1": ((6, 256, 4, 2, 3, 1), 32),
    "cct_7_3x1": ((7, 256, 4, 2, 3, 1), 32),
    "cct_7_3x2": ((7, 256, 4, 2, 3, 2), 32),
    "cct_14_7x2": ((14, 384, 6, 3, 7, 2), 224),
}
default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, side, side), "first_conv": "tokenizer.0"} for name, (_, side) in VARIANTS.items()}
)


def _build(name: str, pretrained: bool, **options: Any) -> CCT:
    (depth, dim, heads, mlp_ratio, kernel, convs), side = VARIANTS[name]
    sizes: dict[str, Any] = {
        "depth": depth,
        "dim": dim,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "kernel": kernel,
        "convs": convs,
    }
    net: CCT = build_model_with_cfg(
        CCT, name, pretrained, **sizes, **{"img_size": side, "global_pool": "seq", **options}
    )
    return net


@register_model
def cct_2_3x2(pretrained: bool = False, **options: Any) -> CCT:
    """Two layers, two 3x3 convolutions: 0.28 million parameters."""
    return _build("cct_2_3x2", pretrained, **options)


@register_model
def cct_4_3x2(pretrained: bool = False, **options: Any) -> CCT:
    """Four layers, two 3x3 convolutions: 0.48 million parameters."""
    return _build("cct_4_3x2", pretrained, **options)


@register_model
def cct_6_3x1(pretrained: bool = False, **options: Any) -> CCT:
    """Six layers, one 3x3 convolution: 3.2 million parameters."""
    return _build("cct_6_3x1", pretrained, **options)


@register_model
def cct_7_3x1(pretrained: bool = False, **options: Any) -> CCT:
    """Seven layers, one 3x3 convolution: 3.8 million parameters; the paper's choice for CIFAR."""
    return _build("cct_7_3x1", pretrained, **options)


@register_model
def cct_7_3x2(pretrained: bool = False, **options: Any) -> CCT:
    """Seven layers, two 3x3 convolutions: 3.8 million parameters, a quarter of the tokens."""
    return _build("cct_7_3x2", pretrained, **options)


@register_model
def cct_14_7x2(pretrained: bool = False, **options: Any) -> CCT:
    """Fourteen layers, two 7x7 convolutions: 22.0 million parameters; for photographs of 224 pixels."""
    return _build("cct_14_7x2", pretrained, **options)
