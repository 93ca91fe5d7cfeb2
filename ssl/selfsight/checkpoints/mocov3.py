"""The MoCo v3 authors' checkpoints in (facebookresearch/moco-v3, ``r-50-*.pth.tar``, ``vit-*.pth.tar``).

The projector stands where the network had its classifier: ``fc`` of a ResNet, ``head`` of a transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.checkpoints.dino import of_the_method
from selfsight.checkpoints.format import Format, State, by_rules


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    last = max(int(name.split(".")[1]) for name in state if name.startswith("projector.") and name.endswith("weight"))
    return [
        f"method.hidden_dim={len(state['projector.0.weight'])}",
        f"method.dim={state['predictor.0.weight'].shape[1]}",
        f"method.heads={'vit' if last > 4 else 'resnet'}",
    ]


def _amend(spec: dict[str, Any], state: State) -> dict[str, Any]:
    """The small transformer has twelve heads, which shapes do not tell."""
    heads = {"num_heads": 12} if spec["name"].startswith("vit_small") else {}
    return {**of_the_method("moco")(spec, state), **heads}


MOCOV3 = Format(
    name="MoCo v3",
    project="facebookresearch/moco-v3",
    marks=(
        r"base_encoder\..+",
        r"momentum_encoder\..+",
        r"base_encoder\.(fc|head)\.0\.weight",
        r"predictor\.0\.weight",
    ),
    rename=by_rules(
        (r"base_encoder\.(?:fc|head)\.(.+)", r"projector.\1"),
        (r"base_encoder\.(.+)", r"backbone.\1"),
        (r"momentum_encoder\.(?:fc|head)\.(.+)", r"momentum_encoder.module.1.\1"),
        (r"momentum_encoder\.(.+)", r"momentum_encoder.module.0.\1"),
        (r"predictor\.(.+)", r"predictor.\1"),
    ),
    method="mocov3",
    settings=_settings,
    untrained=r"momentum_encoder\..+|.+\.pos_embed",
    amend=_amend,
)
