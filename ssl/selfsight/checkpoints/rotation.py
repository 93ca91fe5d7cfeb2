"""The RotNet authors' checkpoints in (gidariss/FeatureLearningRotNet: ``model_net_epoch*``), also as vissl gives them.

A file holds the network under ``network``; vissl's copy of AlexNet under ``model_state_dict`` with a prefix. Files are
of a PyTorch without BatchNorm counters, which are set to 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from selfsight.checkpoints.format import IMAGENET, Format, State, counters
from selfsight.errors import UserError

#: position of a convolution in the authors' list of AlexNet's blocks: its number
ALEXNET = {0: 1, 2: 2, 4: 3, 5: 4, 6: 5}
NIN_UNIT = re.compile(r"_feature_blocks\.\d+\.Block(\d+)_ConvB(\d)\.layers\.(Conv|BatchNorm)\.(.+)")
NIN_HEAD = re.compile(r"_feature_blocks\.\d+\.Classifier\.(.+)")
ALEXNET_UNIT = re.compile(r"_feature_blocks\.([02456])\.([01])\.(.+)")
ALEXNET_HEAD = re.compile(r"_feature_blocks\.(8\.[1245]|9\.0)\.(.+)")
ALEXNET_LAYER = {"8.1": 0, "8.2": 1, "8.4": 3, "8.5": 4, "9.0": 6}


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict for our `Rotation` on ``nin3 | 4 | 5``, or on ``alexnet_rotnet`` with its two hidden layers.

    Raises:
        UserError: a file that is not one of theirs.
    """
    state = checkpoint.get("network", checkpoint.get("model_state_dict", checkpoint))
    found = {_our_name(str(name).removeprefix("trunk.base_model.")): value for name, value in state.items()}
    if "backbone.conv1.0.weight" not in found and "backbone.conv1.0.0.0.weight" not in found:
        raise UserError(
            "This is no checkpoint of gidariss/FeatureLearningRotNet: the first convolution of NIN or AlexNet is not "
            "there; give a model_net_epoch* file of theirs."
        )
    return counters(found)


def _our_name(name: str) -> str:
    if m := NIN_UNIT.fullmatch(name):
        return f"backbone.conv{m[1]}.0.{int(m[2]) - 1}.{0 if m[3] == 'Conv' else 1}.{m[4]}"
    if m := NIN_HEAD.fullmatch(name):
        return f"head.0.{m[1]}"
    if m := ALEXNET_UNIT.fullmatch(name):
        return f"backbone.conv{ALEXNET[int(m[1])]}.{m[2]}.{m[3]}"
    if m := ALEXNET_HEAD.fullmatch(name):
        return f"head.{ALEXNET_LAYER[m[1]]}.{m[2]}"
    return name


def _named(name: str) -> str | None:
    ours = _our_name(name)
    return ours if ours.startswith(("backbone.", "head.")) else None


NIN = Format(
    name="RotNet's NIN",
    project="gidariss/FeatureLearningRotNet",
    marks=(r"_feature_blocks\.0\.Block1_ConvB1\.layers\.Conv\.weight",),
    rename=_named,
    method="rotation",
    finish=counters,
    described={"image_size": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]},
)
ALEXNET_FORMAT = Format(
    name="RotNet's AlexNet",
    project="gidariss/FeatureLearningRotNet",
    marks=(r"_feature_blocks\.0\.0\.weight", r"_feature_blocks\.6\.1\.weight"),
    rename=_named,
    method="rotation",
    settings=lambda state: ["method.hidden_dims=[4096,4096]", "method.map_side=6"],
    finish=counters,
    described=IMAGENET,
)
