"""The SparK authors' checkpoints in, and out again (keyu-tian/SparK).

Two kinds were released: the encoder alone (``*_timm_style.pth``: ResNets under timm's and torchvision's names,
ConvNeXts under those of facebookresearch/ConvNeXt) and the whole pre-training model (``*_spark_style.pth``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selfsight.checkpoints.format import Format, State
from selfsight.errors import UserError

ENCODER = "sparse_encoder.sp_cnn."
#: buffers of the authors' class that carry nothing (two of them uninitialised memory), and its settings
DEAD = ("imn_m", "imn_s", "norm_black", "config")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: (official ConvNeXt, timm, torchvision); i stage, j block or part, and the torchvision index 2 i, 2 i + 1
_CONVNEXT = [
    (r"downsample_layers\.0\.(\d)\.", "stem.{0}.", "features.0.{0}."),
    (r"downsample_layers\.(\d)\.(\d)\.", "stages.{0}.downsample.{1}.", "features.{even}.{1}."),
    (r"stages\.(\d)\.(\d+)\.dwconv\.", "stages.{0}.blocks.{1}.conv_dw.", "features.{odd}.{1}.block.0."),
    (r"stages\.(\d)\.(\d+)\.norm\.", "stages.{0}.blocks.{1}.norm.", "features.{odd}.{1}.block.2."),
    (r"stages\.(\d)\.(\d+)\.pwconv1\.", "stages.{0}.blocks.{1}.mlp.fc1.", "features.{odd}.{1}.block.3."),
    (r"stages\.(\d)\.(\d+)\.pwconv2\.", "stages.{0}.blocks.{1}.mlp.fc2.", "features.{odd}.{1}.block.5."),
    (r"stages\.(\d)\.(\d+)\.gamma$", "stages.{0}.blocks.{1}.gamma", "features.{odd}.{1}.layer_scale"),
    (r"norm\.", "head.norm.", "classifier.0."),
    (r"head\.", "head.fc.", "classifier.2."),
]


def _renamed(name: str, column: int) -> str:
    for pattern, *targets in _CONVNEXT:
        match = re.match(pattern, name)
        if match:
            stage = int(match[1]) if match.lastindex else 0
            target = targets[column].format(*match.groups(), even=2 * stage, odd=2 * stage + 1)
            return target + name[match.end() :]
    return name


def convnext_to_timm(name: str) -> str:
    """timm's name of a ConvNeXt parameter of the official code; other names come back as they are."""
    return _renamed(name, 0)


def convnext_to_torchvision(name: str) -> str:
    """torchvision's name of a ConvNeXt parameter of the official code; other names come back as they are."""
    return _renamed(name, 1)


def convnext_state_to_torchvision(state: Mapping[str, Tensor]) -> State:
    """An official ConvNeXt state dict under torchvision's names, with the layer scales as ``[C, 1, 1]``."""
    return {convnext_to_torchvision(k): v.reshape(-1, 1, 1) if k.endswith(".gamma") else v for k, v in state.items()}


def _is_convnext(names: Mapping[str, Any]) -> bool:
    return any("downsample_layers." in name or name.startswith("stem.0.") for name in names)


def _official_convnext(state: Mapping[str, Tensor]) -> State:
    """A timm ConvNeXt state dict under the official names, in the official order (downsampling layers first)."""
    back = [
        (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
        (r"stages\.(\d)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
        (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
        (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"stages.\1.\2.pwconv\3."),
        (r"stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    ]
    renamed: State = {}
    for name, value in state.items():
        for pattern, target in back:
            new, hits = re.subn("^" + pattern, target, name)
            if hits:
                break
        if not name.startswith("head."):  # the authors' encoder ends with its last stage
            renamed[new] = value
    return dict(sorted(renamed.items(), key=lambda item: not item[0].startswith("downsample_layers.")))


def unwrap(checkpoint: Mapping[str, Any]) -> State:
    """The state dict inside a released file: bare, or under ``module`` beside the optimiser and the arguments."""
    state = checkpoint.get("module", checkpoint)
    return {name: value for name, value in state.items() if name not in DEAD}


def encoder_state(checkpoint: Mapping[str, Any]) -> State:
    """The encoder of either kind of released file, under timm's names (ResNets: torchvision's as well).

    A ConvNeXt of timm ends with a norm after pooling, which those of the authors do not have: it comes as it is
    initialised, ones and zeros.

    Raises:
        UserError: the file holds neither kind.
    """
    state = unwrap(checkpoint)
    if any(name.startswith(ENCODER) for name in state):
        state = {name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)}
    if "conv1.weight" not in state and "downsample_layers.0.0.weight" not in state:
        raise UserError(
            "This is no SparK checkpoint: expected an encoder's weights ('conv1.weight' or "
            f"'downsample_layers.0.0.weight'), got {', '.join(list(state)[:3]) or 'nothing'}, …"
        )
    return with_last_norm({convnext_to_timm(k): v for k, v in state.items()}) if _is_convnext(state) else state


def with_last_norm(state: State, prefix: str = "") -> State:
    """A timm ConvNeXt's state dict with the norm after pooling, as it is initialised where it has none."""
    last = state.get(f"{prefix}stages.3.blocks.0.gamma")
    if last is None or f"{prefix}head.norm.weight" in state:
        return state
    new = {"weight": torch.ones_like(last), "bias": torch.zeros_like(last)}
    return state | {f"{prefix}head.norm.{name}": value for name, value in new.items()}


def method_state(checkpoint: Mapping[str, Any]) -> State:
    """A whole pre-training checkpoint as the state dict of `selfsight.methods.spark.SparK`."""
    state = unwrap(checkpoint)
    if not any(name.startswith(ENCODER) for name in state):
        raise UserError(
            "This SparK checkpoint holds the encoder alone; continuing the pre-training needs a '*_spark_style.pth'."
        )
    rest = {name: value for name, value in state.items() if not name.startswith(ENCODER)}
    return {**{f"backbone.{name}": value for name, value in encoder_state(state).items()}, **rest}


def official_encoder_state(backbone_state: Mapping[str, Tensor]) -> State:
    """The encoder-only file of a backbone's (timm-named) state dict, without its classifier."""
    if _is_convnext(backbone_state):
        return _official_convnext(backbone_state)
    return {name: value for name, value in backbone_state.items() if not name.startswith("fc.")}


def official_state(method_state: Mapping[str, Tensor], image_size: int) -> State:
    """The whole state dict under the authors' names and in their order; their own class loads it strictly.

    Args:
        method_state: of `selfsight.methods.spark.SparK`.
        image_size: side of the training images, which the authors' model fixes.
    """
    backbone = {k.removeprefix("backbone."): v for k, v in method_state.items() if k.startswith("backbone.")}
    device = next(iter(method_state.values())).device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    black = (-mean / std).expand(1, 3, image_size, image_size).contiguous()
    return {
        "imn_m": mean,
        "imn_s": std,
        "norm_black": black,
        **{ENCODER + name: value for name, value in official_encoder_state(backbone).items()},
        **{name: value for name, value in method_state.items() if not name.startswith("backbone.")},
    }


def _our_name(name: str) -> str | None:
    if name.startswith(ENCODER):
        return f"backbone.{convnext_to_timm(name.removeprefix(ENCODER))}"
    return name if name.startswith(("dense_decoder.", "densify_norms.", "densify_projs.", "mask_tokens.")) else None


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    levels = sum(name.startswith("mask_tokens.") for name in state)
    return [f"method.decoder_width={len(state['dense_decoder.dec.0.up_sample.bias'])}", f"method.levels={levels}"]


SPARK = Format(
    name="SparK",
    project="keyu-tian/SparK",
    marks=(r"sparse_encoder\.sp_cnn\..+", r"dense_decoder\.proj\.weight", r"mask_tokens\.0"),
    rename=_our_name,
    unused=(("|".join(DEAD), "constants of the authors' class"), (r"config\..+", "settings of the authors' class")),
    method="spark",
    settings=_settings,
    finish=lambda state: with_last_norm(state, "backbone."),
)
