"""The SupCon authors' checkpoints in (HobbitLong/SupContrast: ``last.pth``, ``ckpt_epoch_*.pth``).

A file holds the network under ``model`` beside ``opt``, ``optimizer`` and ``epoch``. Names start with ``encoder.``, or
``encoder.module.`` where several GPUs trained it; the head is ``head.``, the classifier of the supervised runs ``fc.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfsight.checkpoints.format import Format, State
from selfsight.errors import UserError


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict for our `SupCon`, or `SupCE`, on a ``resnet18 | 34 | 50 | 101`` with ``stem=cifar``.

    Raises:
        UserError: a file that is not one of theirs.
    """
    state = {str(name).replace("module.", ""): value for name, value in checkpoint.get("model", checkpoint).items()}
    if "encoder.conv1.weight" not in state:
        raise UserError(
            "This is no checkpoint of HobbitLong/SupContrast: encoder.conv1.weight is not there; give a last.pth or "
            "ckpt_epoch_*.pth of theirs."
        )
    return {_our_name(name): value for name, value in state.items()}


def backbone_weights(checkpoint: Mapping[str, Any]) -> State:
    """The ResNet alone, under timm's and torchvision's names."""
    state = from_official(checkpoint)
    return {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}


def _our_name(name: str) -> str:
    name = name.replace(".shortcut.", ".downsample.")
    for pattern, ours in (
        (r"^encoder\.", "backbone."),
        (r"^head\.(\d)\.", r"projector.\1."),
        (r"^head\.", "projector.0."),
        (r"^fc\.", "classifier."),
    ):
        name, found = re.subn(pattern, ours, name)
        if found:
            break
    return name


def _named(name: str) -> str | None:
    ours = _our_name(name.replace("module.", ""))
    return ours if ours.startswith(("backbone.", "projector.", "classifier.")) else None


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    hidden = "null" if "projector.2.weight" in state else 0
    last = state["projector.2.weight" if hidden == "null" else "projector.0.weight"]
    return [f"method.hidden_dim={hidden}", f"method.dim={len(last)}"]


_ENCODER = (r"encoder\.(module\.)?conv1\.weight", r"encoder\.(module\.)?layer2\.0\.shortcut\.0\.weight")
_TRAINED_ON = {"image_size": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}  # CIFAR-10

SUPCON = Format(
    name="SupCon",
    project="HobbitLong/SupContrast",
    marks=(*_ENCODER, r"head\.(\d\.)?weight"),
    rename=_named,
    method="supcon",
    settings=_settings,
    described=_TRAINED_ON,
)
SUPCE = Format(
    name="SupCE",
    project="HobbitLong/SupContrast",
    marks=(*_ENCODER, r"fc\.weight"),
    rename=_named,
    method="supce",
    described=_TRAINED_ON,
)
