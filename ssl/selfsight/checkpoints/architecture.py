"""Which network a state dict belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create, is_known
from selfsight.checkpoints.format import RESNETS, State, counters, depth_of, length
from selfsight.checkpoints.spark import convnext_to_timm, with_last_norm
from selfsight.errors import UserError

Spec = dict[str, Any]

#: (groups, width of the first block's 3x3 convolution, depth): timm's name
WIDE = {
    (1, 128, 50): "wide_resnet50_2", (1, 128, 101): "wide_resnet101_2", (32, 128, 50): "resnext50_32x4d",
    (32, 128, 101): "resnext101_32x4d", (32, 256, 101): "resnext101_32x8d", (64, 256, 101): "resnext101_64x4d",
}  # fmt: skip
CONVNEXTS: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 6, 2), 40): "atto", ((2, 2, 6, 2), 48): "femto", ((2, 2, 6, 2), 64): "pico", ((2, 2, 8, 2), 80): "nano",
    ((3, 3, 9, 3), 96): "tiny", ((3, 3, 27, 3), 96): "small", ((3, 3, 27, 3), 128): "base",
    ((3, 3, 27, 3), 192): "large", ((3, 3, 27, 3), 256): "xlarge",
}  # fmt: skip
VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
HEAD_DIM = 64  # of a ViT's attention; huge has 80

#: layers behind the features: a classifier, or the head of a method that took its place
BEHIND = r"(fc|head|heads|classifier|last_linear|head_dist|pre_logits)\b.*"


def recognise(state: Mapping[str, Tensor]) -> tuple[Spec, State] | None:
    """The network of a state dict and the state dict under its names; None where no family here has such names.

    Torchvision's, timm's, mmpretrain's, the official and lightly's names of ResNets, ConvNeXts and ViTs are known.

    Returns:
        Arguments of `selfsight.backbones.registry.create`, and the tensors, a classifier's among them.
    """
    state = renamed(state)
    for mark, family in FAMILIES:
        if any(re.fullmatch(mark, name) for name in state):
            return family(state), state
    return None


def blank(spec: Spec) -> nn.Module:
    """The network that ``spec`` makes, without memory."""
    with torch.device("meta"):
        return create(**{**spec, "pretrained": False})


def matching(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> tuple[State, list[str]]:
    """The tensors of ``state`` that ``wanted`` names, and the names of those left over. Counters may be missing.

    Args:
        what: the network, for the sentence.

    Raises:
        UserError: some are missing or of another shape.
    """
    state = counters(dict(state))
    missing = [name for name in wanted if name not in state]
    other = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if wrong := [*missing, *other]:
        shape = f" ({[*state[other[0]].shape]}, wanted {[*wanted[other[0]].shape]})" if not missing else ""
        raise UserError(
            f"it does not hold a whole {what}: of {len(wanted)} tensors {len(missing)} are missing and {len(other)} "
            f"have another shape, '{wrong[0]}'{shape} for one."
        )
    return {name: state[name] for name in wanted}, [name for name in state if name not in wanted]


def shown(spec: Spec) -> str:
    """``resnet18 (stem cifar)``."""
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name")
    return spec["name"] + (f" ({options})" if options else "")


# --- names -----------------------------------------------------------------------------------------------------------

_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

#: mark of a naming, and (pattern, name here) of it; names that no pattern fits stay as they are
NAMINGS: list[tuple[str, list[tuple[str, str]]]] = [
    # a ResNet's children in a row, without its last ones (lightly's tutorials)
    (r"4\.0\.conv1\.weight", [(rf"{i}\.", f"{name}.") for i, name in _SEQUENTIAL.items()]),
    # torchvision's ConvNeXt
    (
        r"features\.1\.0\.layer_scale",
        [
            (r"features\.0\.([01])\.", r"stem.\1."),
            *((rf"features\.{2 * i}\.([01])\.", rf"stages.{i}.downsample.\1.") for i in (1, 2, 3)),
            *(
                (rf"features\.{2 * i + 1}\.(\d+)\.{theirs}", rf"stages.{i}.blocks.\1.{ours}")
                for i in range(4)
                for theirs, ours in (
                    (r"block\.0\.", "conv_dw."), (r"block\.2\.", "norm."), (r"block\.3\.", "mlp.fc1."),
                    (r"block\.5\.", "mlp.fc2."), ("layer_scale", "gamma"),
                )
            ),
            (r"classifier\.0\.", "head.norm."),
            (r"classifier\.2\.", "head.fc."),
        ],
    ),
    # mmpretrain's ConvNeXt
    (
        r"stages\.0\.0\.depthwise_conv\.weight",
        [
            (r"downsample_layers\.0\.(\d)\.", r"stem.\1."),
            (r"downsample_layers\.(\d)\.(\d)\.", r"stages.\1.downsample.\2."),
            (r"stages\.(\d)\.(\d+)\.depthwise_conv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pointwise_conv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"norm3\.", "head.norm."),
        ],
    ),
    # mmpretrain's ViT; its second last norm stands behind the mean over patches
    (
        r"layers\.0\.ffn\.layers\.0\.0\.weight",
        [
            (r"patch_embed\.projection\.", "patch_embed.proj."),
            (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
            (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
            (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
            (r"layers\.(\d+)\.", r"blocks.\1."),
            (r"ln1\.", "norm."),
            (r"ln2\.", "fc_norm."),
        ],
    ),
    # torchvision's ViT
    (
        r"encoder\.layers\.encoder_layer_0\.ln_1\.weight",
        [
            ("class_token", "cls_token"),
            (r"conv_proj\.", "patch_embed.proj."),
            (r"encoder\.pos_embedding", "pos_embed"),
            *(
                (rf"encoder\.layers\.encoder_layer_(\d+)\.{theirs}", rf"blocks.\1.{ours}")
                for theirs, ours in (
                    (r"ln_([12])\.", r"norm\2."), (r"self_attention\.in_proj_", "attn.qkv."),
                    (r"self_attention\.out_proj\.", "attn.proj."), (r"mlp\.(?:0|linear_1)\.", "mlp.fc1."),
                    (r"mlp\.(?:3|linear_2)\.", "mlp.fc2."),
                )
            ),
            (r"encoder\.ln\.", "norm."),
            (r"heads\.head\.", "head."),
        ],
    ),
]  # fmt: skip


def renamed(state: Mapping[str, Tensor]) -> State:
    """A state dict of any naming known here under timm's names (or ours, of the networks that are ours)."""
    for mark, pairs in NAMINGS:
        if any(re.fullmatch(mark, name) for name in state):
            found = {_renamed(name, pairs): value for name, value in state.items()}
            return {name: v.flatten() if name.endswith(".gamma") else v for name, v in found.items()}
    if "downsample_layers.0.0.weight" in state:  # the official ConvNeXt, of which SparK leaves the last norm out
        state = with_last_norm({convnext_to_timm(name): value for name, value in state.items()})
    return dict(state)


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for pattern, ours in pairs:
        new, found = re.subn(f"^{pattern}", ours, name)
        if found:
            return new
    return name


# --- families --------------------------------------------------------------------------------------------------------


def _with(spec: Spec, **options: Any) -> Spec:
    return spec | {key: value for key, value in options.items() if value is not None}


def _colours(weight: Tensor) -> int | None:
    return weight.shape[1] if weight.shape[1] != 3 else None


def _resnet(state: State) -> Spec:
    """Torchvision's names; of networks that share shapes, too, torchvision's (`simclr_resnet*` have to be named)."""
    depth, bottleneck = depth_of(state)
    layers = [length(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    first, inner = state["conv1.weight"], state["layer1.0.conv2.weight" if bottleneck else "layer1.0.conv1.weight"]
    stem = first.shape[0]
    common = {
        "in_chans": _colours(first),
        "stem": "cifar" if first.shape[2] == 3 else None,
        "layers": None if depth else layers,
    }
    if stem > 64 and bottleneck and depth in (50, 101, 200):
        return _with({"name": f"resnet{depth}_widened", "width": stem // 64}, in_chans=common["in_chans"])
    if not bottleneck and layers == [1, 1, 1, 1] and stem < 64:
        return _with({"name": "resnet10_slim", "width": stem}, in_chans=common["in_chans"], stem=common["stem"])
    groups = inner.shape[0] // inner.shape[1] if bottleneck else 1
    name = WIDE.get((groups, inner.shape[0], depth or 0)) if bottleneck else None
    widths = [state[n].shape[0] for i in (1, 2, 3, 4) if (n := f"layer{i}.0.bn1.weight") in state and not bottleneck]
    return _with(
        {"name": name or f"resnet{depth or (50 if bottleneck else 18)}"},
        **common,
        channels=widths if len(widths) == 4 and widths != [64, 128, 256, 512] else None,
    )


def _deep_stem_resnet(state: State) -> Spec:
    first, layers = state["conv1.0.weight"], tuple(length(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    colours = _colours(first)
    if "layer1.0.conv2.fc1.weight" in state:  # selective kernels: SimCLRv2's
        middle = state["layer4.0.conv2.fc1.weight"].shape
        width = state["bn1.weight"].shape[0] // 64
        spec = {"name": f"simclr_resnet{RESNETS.get((True, layers), 50)}", "width": width}
        return _with(spec, sk_ratio=middle[0] / middle[1], in_chans=colours)
    if layers == (1, 1, 1, 1) and "layer1.0.conv3.weight" not in state:
        return _with({"name": "resnet10_slim", "width": state["layer1.0.bn1.weight"].shape[0]}, in_chans=colours)
    depth = RESNETS.get(("layer1.0.conv3.weight" in state, layers), 50)
    tail = "d" if "layer2.0.downsample.1.weight" in state else "s"
    return _with({"name": f"resnet{depth}{tail}"}, in_chans=colours)


def _convnext(state: State) -> Spec:
    depths = tuple(length(state, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    stem = state["stem.0.weight"]
    size = CONVNEXTS.get((depths, stem.shape[0]))
    second = "stages.0.blocks.0.mlp.grn.weight" in state
    if size is None:
        raise UserError(
            f"it holds a ConvNeXt of {list(depths)} blocks and {stem.shape[0]} channels, which has no name here; "
            "name the network: backbone=NAME."
        )
    name = f"convnextv2_{size}" if second else f"convnext_{size}"
    convolutions = state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4  # in place of linear layers
    usual = size in ("atto", "femto", "pico", "nano") and not second
    return _with({"name": name}, conv_mlp=_unusual(convolutions, usual), in_chans=_colours(stem))


def _vit(state: State) -> Spec:
    if "patch_embed.proj.0.weight" in state:
        return _conv_stem_vit(state)
    patch, positions = state["patch_embed.proj.weight"], state["pos_embed"].shape[1]
    dim, pixels = patch.shape[0], patch.shape[2]
    depth, prefix = length(state, r"blocks\.(\d+)\."), 1 if "cls_token" in state else 0
    unplaced = prefix == 1 and math.isqrt(positions) ** 2 == positions  # its class token has no position
    side = math.isqrt(positions if unplaced else positions - prefix)
    size, image = VITS.get((dim, depth)), pixels * side
    name = f"vit_{size or 'base'}_patch{pixels}_224"
    spec: Spec = {"name": name if is_known(name) else f"vit_{size or 'base'}_patch{14 if size == 'huge' else 16}_224"}
    own = re.fullmatch(r"vit_\w+_patch(\d+)_224", spec["name"])
    pooled = "fc_norm.weight" in state
    return _with(
        spec,
        image_size=image if image != 224 else None,
        patch_size=pixels if own and int(own[1]) != pixels else None,
        embed_dim=dim if size is None else None,
        depth=depth if size is None else None,
        num_heads=max(1, dim // HEAD_DIM) if size is None else None,
        mlp_ratio=_unusual(state["blocks.0.mlp.fc1.weight"].shape[0] / dim, 4.0),
        class_token=None if prefix else False,
        pool="avg" if pooled or not prefix else None,
        fc_norm=False if not prefix and not pooled else None,
        no_embed_class=True if unplaced else None,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        in_chans=_colours(patch),
    )


def _conv_stem_vit(state: State) -> Spec:
    """MoCo v3's transformers whose patches are made by four convolutions."""
    size = {384: "small", 768: "base"}.get(state["pos_embed"].shape[2])
    if size is None:
        raise UserError(
            "it holds a transformer with a convolutional stem that has no name here; name it: backbone=NAME."
        )
    return _with({"name": f"vit_conv_{size}_moco"}, in_chans=_colours(state["patch_embed.proj.0.weight"]))


def _unusual(value: Any, usual: Any) -> Any:
    return None if value == usual else value


def _nin(state: State) -> Spec:
    blocks = length(state, r"conv(\d+)\.") - 1
    return _with({"name": f"nin{blocks}"}, in_chans=_colours(state["conv1.0.0.0.weight"]))


def _alexnet(state: State) -> Spec:
    return _with({"name": "alexnet_rotnet"}, in_chans=_colours(state["conv1.0.weight"]))


def _wide_resnet(state: State) -> Spec:
    stages, units = length(state, r"block(\d+)\.") - 1, length(state, r"block1\.layer\.(\d+)\.")
    widen = state["block1.layer.0.conv1.weight"].shape[0] // 16
    first, others = "conv1.bias" in state, "block1.layer.0.conv1.bias" in state
    flavour = "torchssl" if others else "usb" if first else "simmatch"
    names = {(3, 4, 2): "wrn_28_2", (3, 4, 8): "wrn_28_8", (4, 4, 2): "wrn_37_2"}
    if (stages, units, widen) not in names:
        raise UserError(
            f"it holds a wide ResNet of {stages} stages with {units} units, {widen} times as wide, which has no "
            "name here; name the network: backbone=NAME."
        )
    return _with(
        {"name": names[stages, units, widen]},
        flavour=_unusual(flavour, "usb"),
        first_stride=1 if stages == 4 and flavour == "simmatch" else None,
        in_chans=_colours(state["conv1.weight"]),
    )


#: a name that only networks of the family have, and what tells them apart
FAMILIES: list[tuple[str, Callable[[State], Spec]]] = [
    (r"conv1\.0\.0\.0\.weight", _nin),
    (r"block1\.layer\.0\.conv1\.weight", _wide_resnet),
    (r"conv5\.1\.running_mean", _alexnet),
    (r"blocks\.0\.attn\.qkv\.weight", _vit),
    (r"stages\.0\.blocks\.0\.conv_dw\.weight", _convnext),
    (r"layer1\.0\.conv1\.weight", lambda state: (_resnet if "conv1.weight" in state else _deep_stem_resnet)(state)),
]
