"""MAE's decoder: a narrow transformer that fills in the hidden patches (facebookresearch/mae, models_mae.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.patches import take_patches
from selfsight.nn.positions import sincos_2d


class MAEDecoder(nn.Module):
    """Tokens of the visible patches to the pixels of all.

    Linear to the decoder's width; one learnt vector stands in each hidden place; fixed sines and cosines are added;
    blocks; norm; linear to pixels. Linear layers start as Xavier's uniform, the learnt vector normal with std 0.02.

    Args:
        width: D, of the encoder. grid: h, w of the patches. outputs: numbers to predict of each patch.
        dim, depth, heads, mlp_ratio, eps: of the decoder. prefix: tokens before the patches.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        outputs: int,
        *,
        dim: int,
        depth: int,
        heads: int,
        prefix: int = 1,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        if dim % heads:
            raise UserError(f"MAE's decoder has {heads} heads, and its width of {dim} does not divide by them.")
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = sincos_2d(grid, dim, first="column", prefix=prefix).to(self.mask_token.dtype)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """``[B, prefix + keep, D]`` and the places ``[B, L]`` of the patches to predictions ``[B, L, outputs]``."""
        x = self.embed(tokens)
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] - visible.shape[1], -1)
        patches = take_patches(torch.cat([visible, hidden], dim=1), restore)  # [B, L, dim]
        x = self.blocks(torch.cat([prefix, patches], dim=1) + self.pos_embed)
        return self.pred(self.norm(x))[:, self.prefix :]
