"""Parameter groups: what is decayed and layer-adapted, what is not, and by how much a layer's learning rate shrinks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.errors import UserError

ParamGroup = dict[str, Any]


def all_parameters(module: nn.Module) -> list[ParamGroup]:
    """One group: biases and normalisation are decayed and adapted like all the rest (SwAV, SupContrast, RotNet)."""
    return [{"params": [p for p in module.parameters() if p.requires_grad], "plain": False}]


def split_no_decay(module: nn.Module, plain_names: Sequence[str] = ()) -> list[ParamGroup]:
    """Two groups: kernels (weight decay and layer adaptation) and the rest (``plain``: neither).

    Plain are all tensors with at most one dimension, biases and normalisation (PixPro, contrast/lars.py), and those
    with one of ``plain_names`` in their name, such as the classifier of SimCLR or the mask tokens of SparK.
    """
    return layerwise(module, {}, plain_names)


#: its name before
decayed_and_plain = split_no_decay


def layer_decayed(module: nn.Module, decay: float, plain_names: Sequence[str] = ()) -> list[ParamGroup]:
    """`split_no_decay`, split by layer: every layer below the head multiplies the learning rate by ``decay``."""
    layers, head = layer_ids(name for name, _ in module.named_parameters())
    return layerwise(module, {name: decay ** (head - layer) for name, layer in layers.items()}, plain_names)


def layerwise(module: nn.Module, lr_scales: dict[str, float], plain_names: Sequence[str] = ()) -> list[ParamGroup]:
    """Groups of parameters that agree in being plain and in the multiple of the learning rate they take (default 1)."""
    groups: dict[tuple[bool, float], ParamGroup] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or any(part in name for part in plain_names)
            scale = lr_scales.get(name, 1.0)
            group = groups.setdefault((plain, scale), {"params": [], "plain": plain})
            group["params"].append(p)
            if plain:
                group["weight_decay"] = 0.0
            if scale != 1.0:
                group["lr_scale"] = scale
    return list(groups.values())


def layer_ids(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """Layers of a ResNet, ConvNeXt or ViT (timm's parameter names, with any prefix) from the input; the head's number.

    SparK's numbering (downstream_imagenet/lr_decay.py): the stem is 0 and every stage is one layer, except that the
    middle ones of a ResNet are cut every 2 and 3 blocks (every 4 from ResNet-152 on), and the third of a ConvNeXt
    every 3. What belongs to neither the stem nor a stage is the head. A transformer has the patches, the tokens beside
    them and their positions in layer 0, then one layer a block (MAE, util/lr_decay.py).
    """
    names = list(names)
    if any(re.search(_VIT_BLOCK, name) for name in names):
        return _vit_layer_ids(names)
    places = {name: re.search(r"\b(?:layer|stages\.)(\d+)\.(?:blocks\.)?(downsample|\d+)\.", name) for name in names}
    blocks = [(int(m[1]), int(m[2]) if m[2].isdigit() else 0) for m in places.values() if m]
    stages = sorted({stage for stage, _ in blocks})
    if len(stages) != 4:
        raise UserError(
            f"Layer-wise learning rates need the four stages of a ResNet or ConvNeXt, or the blocks of a ViT; the "
            f"parameters' names show {len(stages)} stages. Set the layer decay to 1."
        )
    depths = [1 + max(block for stage, block in blocks if stage == s) for s in stages]
    convnext, very_deep = stages[0] == 0, depths[2] > 30
    middle = (depths[1], 3) if convnext else (4, 4) if very_deep else (2, 3)
    cuts = [depths[0], *middle, depths[3]]
    starts = list(itertools.accumulate((math.ceil(d / c) for d, c in zip(depths, cuts, strict=True)), initial=1))

    def layer(name: str) -> int:
        place = places[name]
        if place is None:
            return 0 if re.search(r"\b(conv1|bn1|stem)\b", name) else starts[4]
        stage, block = stages.index(int(place[1])), int(place[2]) if place[2].isdigit() else 0
        return starts[stage] + block // cuts[stage]

    return {name: layer(name) for name in places}, starts[4]


#: a block of a plain transformer; those of other networks stand inside numbered stages
_VIT_BLOCK = r"(?<!\d\.)\bblocks\.(\d+)\."


def _vit_layer_ids(names: Sequence[str]) -> tuple[dict[str, int], int]:
    blocks = {name: int(place[1]) for name in names if (place := re.search(_VIT_BLOCK, name))}
    head = max(blocks.values()) + 2
    first = r"\b(cls_token|reg_token|dist_token|mask_token|pos_embed|patch_embed|norm_pre)\b"
    return {n: blocks[n] + 1 if n in blocks else 0 if re.search(first, n) else head for n in names}, head


def l2_penalty(parameters: Iterable[Tensor], weight_decay: float) -> Tensor:
    """``weight_decay / 2 sum |w|^2``: decay as a term of the loss, for what the optimiser does not decay.

    SimCLR (model_util.py) adds it for the kernel of the classifier under LARS, and for `outside_batchnorm` of the
    whole model under any other optimiser.
    """
    return weight_decay / 2 * torch.stack([p.square().sum() for p in parameters]).sum()


def outside_batchnorm(module: nn.Module) -> list[nn.Parameter]:
    """Every trained parameter that is no scale or shift of a BatchNorm; biases are among them."""
    inside = {
        id(p)
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for p in m.parameters(recurse=False)
    }
    return [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
