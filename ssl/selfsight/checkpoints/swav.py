"""The SwAV authors' checkpoints in (facebookresearch/swav: ``*_pretrain.pth.tar`` and training checkpoints).

A released file is a flat mapping, a training checkpoint holds one under ``state_dict``; names carry the prefix
``module.``. Beside ``projection_head`` and ``prototypes`` all names are torchvision's, without ``fc``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.errors import UserError

State = dict[str, Tensor]

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
    return {_our_name(name): value for name, value in state.items()}


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


def _our_name(name: str) -> str:
    head = next((head for head in HEADS if name.startswith(head)), None)
    return f"backbone.{name}" if head is None else HEADS[head] + name.removeprefix(head)


def _authors_state(checkpoint: Mapping[str, Any]) -> State:
    state = checkpoint.get("state_dict", checkpoint)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith("prototypes.") for name in state) or "projection_head.0.weight" not in state:
        raise UserError(
            "This is no SwAV checkpoint: prototypes and projection_head.0.weight are not both there; give a "
            "*_pretrain.pth.tar or checkpoint.pth.tar of facebookresearch/swav."
        )
    return state
