"""The SwAV authors' checkpoints in (facebookresearch/swav: ``*_pretrain.pth.tar`` and training checkpoints).

A released file is a flat mapping, a training checkpoint holds one under ``state_dict``; names carry the prefix
``module.``. Beside ``projection_head`` and ``prototypes`` all names are torchvision's, without ``fc``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.checkpoints.format import IMAGENET, Format, State, by_rules
from selfsight.errors import UserError

HEADS = {"projection_head.": "projector.", "prototypes.": "prototypes."}


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict for our `SwAV` (``load_state_dict(..., strict=False)``: queue and usage are not among the released).

    The rows of the prototypes are as the optimiser left them; `SwAV` normalises them before it uses them.

    Raises:
        UserError: a file that is not one of theirs, or one with several prototype layers.
    """
    state = _authors_state(checkpoint)
    if "prototypes.weight" not in state:
        raise UserError(
            "This checkpoint has no single layer of prototypes ('prototypes.weight'), as SwAV's have; of one of "
            "DeepCluster-v2 or SeLa-v2 take `backbone_weights`."
        )
    return SWAV.convert(state).state


def official_names(state: Mapping[str, Tensor]) -> State:
    """Network and prototypes of our `SwAV` under the authors' names, without ``module.``."""
    back = {ours: theirs for theirs, ours in HEADS.items()} | {"backbone.": ""}
    named = {}
    for name, value in state.items():
        ours = next((prefix for prefix in back if name.startswith(prefix)), None)
        if ours is not None:
            named[back[ours] + name.removeprefix(ours)] = value
    return named


def backbone_weights(checkpoint: Mapping[str, Any]) -> State:
    """The ResNet alone under torchvision's names; nothing but ``fc`` is missing.

    Files of DeepCluster-v2 and SeLa-v2, which have several prototype layers, serve as well.
    """
    return {name: value for name, value in _authors_state(checkpoint).items() if not name.startswith(tuple(HEADS))}


_our_name = by_rules(
    (r"projection_head\.(weight|bias)", r"projector.0.\1"),  # a head without hidden layer
    (r"projection_head\.(.+)", r"projector.\1"),
    (r"prototypes\.weight", "prototypes.weight"),
    (r"prototypes\.prototypes(\d+\.weight)", r"prototypes.\1"),
    (r"(.+)", r"backbone.\1"),
)


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    heads = [value.shape for name, value in state.items() if name.startswith("prototypes.")]
    numbers = [shape[0] for shape in heads]
    hidden = state["projector.0.weight"].shape[0] if "projector.3.weight" in state else 0
    return [
        f"method.hidden_dim={hidden}",
        f"method.dim={heads[0][1]}",
        f"method.num_prototypes={numbers[0] if 'prototypes.weight' in state else numbers}",
    ]


def _authors_state(checkpoint: Mapping[str, Any]) -> State:
    state = checkpoint.get("state_dict", checkpoint)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith("prototypes.") for name in state) or "projection_head.0.weight" not in state:
        raise UserError(
            "This is no SwAV checkpoint: prototypes and projection_head.0.weight are not both there; give a "
            "*_pretrain.pth.tar or checkpoint.pth.tar of facebookresearch/swav."
        )
    return state


_BACKBONE, _HEAD = r"layer1\.0\.conv1\.weight", r"projection_head\.(0\.)?weight"
_TRAINED_ON = {**IMAGENET, "std": [0.228, 0.224, 0.225]}  # sic

SWAV = Format(
    name="SwAV",
    project="facebookresearch/swav",
    marks=(_BACKBONE, _HEAD, r"prototypes\.weight"),
    rename=_our_name,
    method="swav",
    settings=_settings,
    anew=(r"queues\..+", "usage"),  # the authors' queues lie in files of their own, one a process
    described=_TRAINED_ON,
)
DEEPCLUSTERV2 = Format(
    name="DeepCluster-v2",
    project="facebookresearch/swav",
    marks=(_BACKBONE, _HEAD, r"prototypes\.prototypes0\.weight"),
    rename=_our_name,
    method="deepclusterv2",
    settings=_settings,
    anew=("memory", "known", "clusters"),  # of the images, which may be others now
    described=_TRAINED_ON,
)
