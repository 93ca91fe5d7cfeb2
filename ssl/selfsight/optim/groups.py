"""Parameter groups: what is decayed and layer-adapted, what is not, and by how much a layer's learning rate shrinks."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from selfsight.errors import UserError

ParamGroup = dict[str, Any]


#: stage and block of a ResNet or ConvNeXt in a parameter's name
STAGE = re.compile(r"\b(?:layer|stages\.)(\d+)\.(?:blocks\.)?(downsample|\d+)\.")
#: a block of a plain transformer; those of other networks stand inside numbered stages, or hold numbered blocks
VIT_BLOCK = re.compile(r"(?<!\d\.)\bblocks\.(\d+)\.(?!\d)")
#: a block of anything; a network with further kinds of blocks is no plain transformer
ANY_BLOCK = re.compile(r"blocks\w*\.\d+\.")
#: a part of a parameter's name that says it is a place or a token, for networks that do not list theirs
PLACES = re.compile(r"(?:^|\.)(?:pos_embed|rel_pos|cls_token|dist_token|reg_token)")


def all_parameters(module: nn.Module, *, decay_places: bool = False) -> list[ParamGroup]:
    """One group: biases and normalisation are decayed and adapted like all the rest (SwAV, SupContrast, RotNet).

    Only what `places_and_tokens` finds is in another, undecayed: the authors' networks have none. With
    ``decay_places`` it is not, as in MoCo v3.
    """
    places = set() if decay_places else places_and_tokens(module)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: list[ParamGroup] = [{"params": [p for name, p in named if name not in places], "plain": False}]
    if apart := [p for name, p in named if name in places]:
        groups.append({"params": apart, "plain": True, "weight_decay": 0.0})
    return groups


def split_no_decay(
    module: nn.Module, plain_names: Sequence[str] = (), *, decay_places: bool = False
) -> list[ParamGroup]:
    """Two groups: kernels (weight decay and layer adaptation) and the rest (``plain``: neither).

    Plain are all tensors with at most one dimension, biases and normalisation (PixPro, contrast/lars.py), those with
    one of ``plain_names`` in their name, such as the classifier of SimCLR or the mask tokens of SparK, and position
    embeddings and tokens (`places_and_tokens`), unless ``decay_places``, as in DINO and MAE.
    """
    return layerwise(module, {}, plain_names, decay_places=decay_places)


#: its name before
decayed_and_plain = split_no_decay


def layer_decayed(
    module: nn.Module, decay: float, plain_names: Sequence[str] = (), *, decay_places: bool = False
) -> list[ParamGroup]:
    """`split_no_decay`, split by layer: every layer below the head multiplies the learning rate by ``decay``.

    Layers of ResNets and ConvNeXts are those of `layer_ids`, layers of other networks those that timm's
    ``group_matcher`` names: for a vision transformer the embedding is the first, and each block is one.
    """
    names = [name for name, _ in module.named_parameters()]
    in_blocks = [name for name in names if ANY_BLOCK.search(name)]
    plain_transformer = bool(in_blocks) and all(VIT_BLOCK.search(name) for name in in_blocks)
    by_name = len(_stages(names)) == 4 or plain_transformer
    layers, head = layer_ids(names) if by_name else matched_layers(module)
    scales = {name: decay ** (head - layer) for name, layer in layers.items()}
    return layerwise(module, scales, plain_names, decay_places=decay_places)


def layerwise(
    module: nn.Module, lr_scales: dict[str, float], plain_names: Sequence[str] = (), *, decay_places: bool = False
) -> list[ParamGroup]:
    """Groups of parameters that agree in being plain and in the multiple of the learning rate they take (default 1)."""
    groups: dict[tuple[bool, float], ParamGroup] = {}
    places = set() if decay_places else places_and_tokens(module)
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or name in places or any(part in name for part in plain_names)
            scale = lr_scales.get(name, 1.0)
            group = groups.setdefault((plain, scale), {"params": [], "plain": plain})
            group["params"].append(p)
            if plain:
                group["weight_decay"] = 0.0
            if scale != 1.0:
                group["lr_scale"] = scale
    return list(groups.values())


def places_and_tokens(module: nn.Module) -> set[str]:
    """Names of the position embeddings, tables of relative positions, and class, distillation and register tokens.

    They are no kernels, and decay would pull all places together: what the networks inside say themselves (timm's
    ``no_weight_decay``: names or patterns), and what is called so.
    """
    found = {name for name, _ in module.named_parameters() if PLACES.search(name)}
    for prefix, part in module.named_modules():
        listed = getattr(part, "no_weight_decay", None)
        for pattern in listed() if callable(listed) else ():
            found |= {
                f"{prefix}.{name}" if prefix else name
                for name, _ in part.named_parameters()
                if fnmatch.fnmatchcase(name, pattern)
            }
    return found


def matched_layers(module: nn.Module) -> tuple[dict[str, int], int]:
    """Layers of the parameters by timm's ``group_matcher`` of the network inside, from the input, and the head's.

    Raises:
        UserError: there is no such network.
    """
    from timm.models import group_parameters

    place = next(
        ((name, part) for name, part in module.named_modules() if callable(getattr(part, "group_matcher", None))), None
    )
    if place is None:
        raise UserError(
            "Layer-wise learning rates need the four stages of a ResNet or ConvNeXt, or a network that tells its "
            f"layers apart as timm's do (group_matcher), and {type(module).__name__} has neither. Set the layer decay "
            "to 1."
        )
    prefix, network = f"{place[0]}." if place[0] else "", cast(Any, place[1])
    last = "a classifier"  # what the matcher does not know comes after everything
    named: Any = SimpleNamespace(named_parameters=lambda: [*network.named_parameters(), (last, None)])
    layers = group_parameters(named, network.group_matcher(), reverse=True)
    head = layers[last]
    return {name: layers.get(name.removeprefix(prefix), head) for name, _ in module.named_parameters()}, head


def layer_ids(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """Layers of a ResNet, ConvNeXt or ViT (timm's parameter names, with any prefix) from the input; the head's number.

    SparK's numbering (downstream_imagenet/lr_decay.py): the stem is 0 and every stage is one layer, except that the
    middle ones of a ResNet are cut every 2 and 3 blocks (every 4 from ResNet-152 on), and the third of a ConvNeXt
    every 3. What belongs to neither the stem nor a stage is the head. A transformer has the patches, the tokens beside
    them and their positions in layer 0, then one layer a block (MAE, util/lr_decay.py).
    """
    names = list(names)
    if any(VIT_BLOCK.search(name) for name in names):
        return _vit_layer_ids(names)
    places = {name: STAGE.search(name) for name in names}
    blocks = [(int(m[1]), int(m[2]) if m[2].isdigit() else 0) for m in places.values() if m]
    stages = _stages(places)
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


def _stages(names: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in names if (m := STAGE.search(name))})


def _vit_layer_ids(names: Sequence[str]) -> tuple[dict[str, int], int]:
    blocks = {name: int(place[1]) for name in names if (place := VIT_BLOCK.search(name))}
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
