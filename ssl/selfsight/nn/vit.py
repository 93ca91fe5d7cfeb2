"""What methods and evaluations read inside a vision transformer of timm: tokens of several blocks, attention, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from selfsight.errors import UserError
from selfsight.nn.patches import take_patches

if TYPE_CHECKING:  # timm is imported by `selfsight.backbones` alone, which comes above
    from timm.models.vision_transformer import VisionTransformer


def is_vit(backbone: nn.Module) -> bool:
    """Whether a backbone is a plain transformer on patches, whose tokens can be left out (``vit_*``, ``deit_*``)."""
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None


def visible_tokens(vit: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """The encoder on a part of the patches: class token and other prefixes, then the visible ones, normalised.

    Args:
        images: ``[B, C, H, W]``. visible: ``[B, keep]`` int64, positions of the patches that stay.

    Returns:
        ``[B, prefix + keep, D]``.
    """
    x = vit._pos_embed(vit.patch_embed(images))  # [B, prefix + L, D]
    prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
    x = vit.norm_pre(torch.cat([prefix, take_patches(patches, visible)], dim=1))
    if vit.grad_checkpointing and x.requires_grad:
        x = checkpoint_sequential(vit.blocks, len(vit.blocks), x, use_reentrant=False)
    else:
        x = vit.blocks(x)
    return vit.fc_norm(vit.norm(x))  # one of the two is the identity


def last_tokens(vit: VisionTransformer, images: Tensor, blocks: int, *, average: bool = False) -> Tensor:
    """Class tokens of the last ``blocks`` blocks side by side, each through the final norm: ``[B, blocks D]``.

    With ``average`` the mean of the patches follows each of their numbers: class, mean, class, mean, … ``[B, 2 D]``
    (DINO's linear evaluation: four blocks for ViT-S, one and the average for ViT-B).

    Raises:
        UserError: more blocks than there are, or the average with more than one block, which nobody measures.
    """
    depth = len(vit.blocks)
    if not 1 <= blocks <= depth or (average and blocks > 1):
        raise UserError(
            f"Tokens of the last {blocks} blocks{' and their average' if average else ''} were asked for; this network "
            f"has {depth}, and an average goes with one."
        )
    layers = vit.get_intermediate_layers(images, n=blocks, norm=True, return_prefix_tokens=True)
    classes = torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)  # [B, blocks D]
    if not average:
        return classes
    return torch.stack([classes, layers[-1][0].mean(1)], dim=-1).flatten(1)


@torch.no_grad()
def last_attention(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of the last block ``[B, heads, N, N]``, rows summing to one."""
    attention: Any = vit.blocks[-1].attn
    found: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        vit.forward_features(images)
    finally:
        attention.fused_attn = fused
        hook.remove()
    return found[0]


def class_attention(attention: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """How the class token looks at the patches: ``[B, heads, N, N]`` to maps ``[B, heads, h, w]``."""
    return attention[:, :, 0, prefix:].unflatten(-1, grid)


def mass_mask(attention: Tensor, threshold: float) -> Tensor:
    """The fewest places that hold a share ``threshold`` of the attention, bool ``[..., h, w]`` (DINO's pictures)."""
    values, order = attention.flatten(-2).sort(dim=-1)
    kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - threshold
    return kept.gather(-1, order.argsort(dim=-1)).unflatten(-1, attention.shape[-2:])


def without_drop_path(network: nn.Module) -> nn.Module:
    """``network`` itself, with stochastic depth switched off everywhere: for teachers in training mode."""
    from timm.layers import DropPath

    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return network
