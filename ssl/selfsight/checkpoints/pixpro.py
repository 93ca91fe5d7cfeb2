"""The PixPro authors' checkpoints in, and out again (zdaxie/PixPro, ``ckpt_epoch_*.pth`` and the published files).

The weights lie under ``model``, their names carry the prefix ``module.``. ``encoder`` is torchvision's ResNet without
``fc``; the online one is what both of the authors' converters take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.checkpoints.format import Format, State
from selfsight.errors import UserError

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
    names = {name: _other_name(name, theirs) for name in state}
    return {other: state[name] for name, other in names.items() if other is not None}


def _other_name(name: str, theirs: int = 0) -> str | None:
    pair = next((p for p in _PARTS if name.startswith(p[theirs])), None)
    if pair is None:
        return None
    rest = name.removeprefix(pair[theirs])
    layer = None if "backbone." in pair[1] else next((x for x in _LAYERS if rest.startswith(x[theirs])), None)
    if layer is not None:
        rest = layer[1 - theirs] + rest.removeprefix(layer[theirs])
    return pair[1 - theirs] + rest


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    transform = "propagation.value_transform."
    layers = 2 if f"{transform}3.weight" in state else 1 if f"{transform}weight" in state else 0
    dim, hidden = state["projector.3.weight"].shape[:2]
    instance = "instance_predictor.0.weight" in state
    return [
        f"method.hidden_dim={hidden}",
        f"method.dim={dim}",
        f"method.transform_layers={layers}",
        f"method.instance_weight={1.0 if instance else 0.0}",
    ]


def _authors_state(checkpoint: Mapping[str, Any]) -> State:
    state = checkpoint.get("model", checkpoint)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith("encoder_k.") for name in state) or "projector.linear1.weight" not in state:
        raise UserError(
            "This is no PixPro checkpoint: encoder_k and projector.linear1.weight are not both there; give a "
            "ckpt_epoch_*.pth or a published file of zdaxie/PixPro."
        )
    return state


PIXPRO = Format(
    name="PixPro",
    project="zdaxie/PixPro",
    marks=(r"encoder\.conv1\.weight", r"encoder_k\.conv1\.weight", r"projector\.linear1\.weight"),
    rename=_other_name,
    method="pixpro",
    settings=_settings,
    untrained=r"\w+_k\..+",
)
