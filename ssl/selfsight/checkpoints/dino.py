"""The DINO authors' full checkpoints in (facebookresearch/dino, ``*_full_checkpoint.pth``): student and teacher.

Files of the backbone alone are the teacher's, under timm's or torchvision's names; they are weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from selfsight.backbones.registry import is_known
from selfsight.checkpoints.format import Format, State, by_rules


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    linear = [v for k, v in state.items() if re.fullmatch(r"head\.mlp\.\d+\.weight", k) and v.ndim == 2]
    return [
        f"method.out_dim={len(state['centre'])}",
        f"method.head_layers={len(linear)}",
        f"method.hidden_dim={linear[0].shape[0] if len(linear) > 1 else 2048}",
        f"method.bottleneck_dim={linear[-1].shape[0]}",
        f"method.head_norm={str(any('running_mean' in k and k.startswith('head.') for k in state)).lower()}",
    ]


def _centre_in_a_row(state: State) -> State:
    """The centre without its first dimension; a head of one layer as a list of one."""
    named = {re.sub(r"\bhead\.mlp\.(weight|bias)$", r"head.mlp.0.\1", name): value for name, value in state.items()}
    return {**named, "centre": named["centre"].flatten()}


def of_the_method(kind: str) -> Callable[[dict[str, Any], State], dict[str, Any]]:
    """`Format.amend` that takes the method's own ViT for timm's: its positions follow the paper when resized."""

    def amend(spec: dict[str, Any], state: State) -> dict[str, Any]:
        size = re.match(r"vit_(tiny|small|base|large|huge)_patch(\d+)_224$", spec["name"])
        if size is None:
            return spec
        usual = 14 if size[1] == "huge" and kind == "mae" else 16
        patch = {} if "patch_size" in spec or int(size[2]) == usual else {"patch_size": int(size[2])}
        name = f"vit_{size[1]}_{kind}"
        return {**spec, "name": name, **patch} if is_known(name) else spec

    return amend


DINO = Format(
    name="DINO",
    project="facebookresearch/dino",
    marks=(
        r"student\.(module\.)?backbone\..+",
        r"teacher\.(module\.)?backbone\..+",
        r"teacher\.(module\.)?head\.last_layer\.weight_v",
        r"dino_loss\.center",
    ),
    rename=by_rules(
        (r"student\.(?:module\.)?(backbone|head)\.(.+)", r"\1.\2"),
        (r"teacher\.(?:module\.)?(backbone|head)\.(.+)", r"teacher.module.\1.\2"),
        (r"dino_loss\.center", "centre"),
    ),
    method="dino",
    settings=_settings,
    finish=_centre_in_a_row,
    network="teacher.module.backbone.",
    untrained=r"teacher\..+|dino_loss\..+",
    amend=of_the_method("dino"),
)
