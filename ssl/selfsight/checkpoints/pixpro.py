"""The PixPro authors' checkpoints in, and out again (zdaxie/PixPro, ``ckpt_epoch_*.pth`` and the published files).

The weights lie under ``model``, their names carry the prefix ``module.``. ``encoder`` is torchvision's ResNet without
``fc``; the online one is what both of the authors' converters take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.errors import UserError

State = dict[str, Tensor]

#: (the authors' prefix, ours)
_PARTS = (
    ("encoder.", "backbone."),
    ("encoder_k.", "target_backbone.module."),
    ("projector.", "projector."),
    ("projector_k.", "target_projector.module."),
    ("value_transform.", "propagation.value_transform."),
    ("projector_instance.", "instance_projector."),
    ("projector_instance_k.", "target_instance_projector.module."),
    ("predictor.", "instance_predictor."),
)
#: layers of a head: two 1x1 convolutions with BatchNorm and ReLU between
_LAYERS = (("linear1.", "0."), ("bn1.", "1."), ("linear2.", "3."))


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict for our `PixPro`, built with the same widths, transform layers and instance branch.

    Raises:
        UserError: a file that is not one of theirs.
    """
    return _renamed(_authors_state(checkpoint), theirs=0)


def official_names(state: Mapping[str, Tensor]) -> State:
    """State dict of our `PixPro` under the authors' names, without ``module.``."""
    return _renamed(state, theirs=1)


def backbone_weights(checkpoint: Mapping[str, Any]) -> State:
    """The online ResNet under torchvision's names; nothing but ``fc`` is missing."""
    state = _authors_state(checkpoint)
    return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}


def _renamed(state: Mapping[str, Tensor], theirs: int) -> State:
    """Names from column ``theirs`` of the tables to the other one."""
    named = {}
    for name, value in state.items():
        pair = next((p for p in _PARTS if name.startswith(p[theirs])), None)
        if pair is not None:
            rest = name.removeprefix(pair[theirs])
            layer = None if "backbone." in pair[1] else next((x for x in _LAYERS if rest.startswith(x[theirs])), None)
            if layer is not None:
                rest = layer[1 - theirs] + rest.removeprefix(layer[theirs])
            named[pair[1 - theirs] + rest] = value
    return named


def _authors_state(checkpoint: Mapping[str, Any]) -> State:
    state = checkpoint.get("model", checkpoint)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith("encoder_k.") for name in state) or "projector.linear1.weight" not in state:
        raise UserError(
            "This is no PixPro checkpoint: encoder_k and projector.linear1.weight are not both there; give a "
            "ckpt_epoch_*.pth or a published file of zdaxie/PixPro."
        )
    return state
