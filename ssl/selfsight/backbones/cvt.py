"""CvT: a transformer of three stages whose tokens are embedded, and whose queries, keys and values are projected, by
convolutions. There are no positions; keys and values are taken at half the resolution.

    Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang: CvT: Introducing Convolutions to Vision Transformers. ICCV 2021,
    arXiv:2103.15808. Code: microsoft/CvT.

As in the code, similarities are divided by the root of the whole width, not of one head's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution of ``stride`` with BatchNorm, then a linear layer: tokens to tokens.

    The ``n`` tokens before the patches meet the linear layer alone.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        tokens, patches = x.split([x.shape[1] - size[0] * size[1], size[0] * size[1]], dim=1)
        maps = self.bn(self.conv(patches.transpose(1, 2).unflatten(2, size)))
        return self.linear(torch.cat([tokens, maps.flatten(2).transpose(1, 2)], dim=1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.q, self.k, self.v = ConvProjection(dim, 1), ConvProjection(dim, 2), ConvProjection(dim, 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (part(x, size).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp, self.drop_path = Attention(dim, heads), Mlp(dim, 4 * dim), DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """``[B, C, h, w]`` to ``[B, dim, h', w']``; with a class token to ``[B, 1 + h' w', dim]``."""

    def __init__(
        self, wide_in: int, dim: int, heads: int, kernel: int, stride: int, rates: Sequence[float], class_token: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(wide_in, dim, kernel, stride, padding=2 if kernel == 7 else 1)
        self.norm = nn.LayerNorm(dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02)) if class_token else None
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        size = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, size)
        return x.transpose(1, 2).unflatten(2, size) if self.cls_token is None else x


class CvT(nn.Module):
    """``[B, in_chans, H, W] -> [B, 384]``, with timm's interface; images of any size.

    Args:
        depths: blocks of the three stages.
        global_pool: ``token`` (the class token of the last stage) or ``avg`` (the mean of its patches).
        drop_path_rate: of the last block; it grows from 0 within the last stage, as in the authors' configurations.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        depths: tuple[int, int, int],
        *,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool is '{global_pool}', and this network pools by 'token' or 'avg'")
        widths, heads = (in_chans, 64, 192, 384), (1, 3, 6)
        growing = [drop_path_rate * i / max(1, depths[2] - 1) for i in range(depths[2])]
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, rates in enumerate([[0.0] * depths[0], [0.0] * depths[1], growing]):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            stage = Stage(widths[i], widths[i + 1], heads[i], kernel, stride, rates, class_token=i == 2)
            self.stages.append(stage)
            self.feature_info.append({"num_chs": widths[i + 1], "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.norm = nn.LayerNorm(384)
        self.num_features, self.global_pool = 384, global_pool
        self.reset_classifier(num_classes)
        self.apply(_start)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``[B, 1 + h w, 384]``, the class token first."""
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, 384]`` of tokens; logits where there are classes and ``pre_logits`` is off."""
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
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
        return {"stages.2.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's: which parameters are a layer together; what embeds a stage comes with its first block."""
        blocks = [(r"^stages\.(\d+)\.(?:embed|norm|cls_token)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"blocks": [*blocks, (r"^norm", (99999,))]}


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, 224, 224), "first_conv": "stages.0.embed"} for name in ("cvt_13", "cvt_21")}
)


@register_model
def cvt_13(pretrained: bool = False, **options: Any) -> CvT:
    """1, 2 and 10 blocks: 19.6 million parameters."""
    net: CvT = build_model_with_cfg(CvT, "cvt_13", pretrained, depths=(1, 2, 10), **{"global_pool": "token", **options})
    return net


@register_model
def cvt_21(pretrained: bool = False, **options: Any) -> CvT:
    """1, 4 and 16 blocks: 31.2 million parameters."""
    net: CvT = build_model_with_cfg(CvT, "cvt_21", pretrained, depths=(1, 4, 16), **{"global_pool": "token", **options})
    return net
