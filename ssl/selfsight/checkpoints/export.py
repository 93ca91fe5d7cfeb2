"""A trained backbone carried away: as safetensors with a description, for torchvision, timm, detectron2, as ONNX."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsight import __version__
from selfsight.contracts import Backbone
from selfsight.errors import UserError

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"


def export_backbone(backbone: nn.Module, spec: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``backbone.safetensors`` and ``backbone.json`` into ``folder``; each is whole or as it was before.

    Args:
        backbone: compiled ones are unwrapped.
        spec: goes into the description. `selfsight.load` reads ``backbone`` in it, the arguments of
            `selfsight.backbones.registry.create` or of the ``_target_`` it names; others will want ``image_size``,
            ``mean``, ``std`` and ``method``.
    Returns:
        Path of the weights.

    Raises:
        UserError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder, net = Path(folder), unwrapped(backbone)
    weights = state(net)
    description = {
        **spec,
        "num_features": net.num_features,
        "parameters": sum(p.numel() for p in net.parameters()),
        "selfsight": __version__,
    }
    replace(folder / WEIGHTS, lambda path: path.write_bytes(save(weights, {"format": "pt"})))
    replace(folder / DESCRIPTION, lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))
    return folder / WEIGHTS


def unwrapped(backbone: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` made of it, or the network itself."""
    inner = getattr(backbone, "_orig_mod", backbone)
    assert isinstance(inner, nn.Module)
    return inner


def state(backbone: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU, plainly laid out, sharing no memory with the network."""
    items = unwrapped(backbone).state_dict().items()
    return {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in items}


def to_timm(backbone: nn.Module) -> dict[str, Tensor]:
    """State dict for ``timm.create_model(name, num_classes=0)`` with ``strict=True``.

    A network with ``stem="cifar"`` needs the same stem there: a 3x3 `conv1` of stride 1, and no `maxpool`.
    """
    return state(backbone)


def export_timm(backbone: Backbone, arguments: Mapping[str, Any], path: str | Path) -> Path:
    """Write the backbone as safetensors for the network of timm that `timm_call` names.

    Args:
        arguments: those of `selfsight.backbones.registry.create`, as ``backbone.json`` has them.

    Raises:
        UserError: timm has no such network, or it has other layers there; or ``path`` cannot be written.
    """
    import timm
    from safetensors.torch import save

    from selfsight.backbones.registry import choices

    name, weights = name_of(arguments), to_timm(backbone)
    ours = name in choices()
    if ours or not timm.is_model(name):
        raise UserError(
            f"timm has no '{name}'{', which is a network of ours' * ours}; format=onnx and safetensors take any "
            "network, torchvision ResNets of the usual depths."
        )
    with torch.device("meta"):
        twin = timm.create_model(name, num_classes=0, **timm_options(backbone)).state_dict()
    other = set(twin) ^ set(weights) | {k for k in twin.keys() & weights.keys() if twin[k].shape != weights[k].shape}
    if arguments.get("stem") == "cifar":
        other.discard("conv1.weight")
    if other:
        raise UserError(
            f"timm's '{name}' has other layers than this one ('{min(other)}' differs); format=onnx and safetensors "
            "take any network."
        )
    replace(Path(path), lambda target: target.write_bytes(save(weights, {"format": "pt"})))
    return Path(path)


def timm_options(backbone: nn.Module) -> dict[str, Any]:
    """What ``timm.create_model`` is given besides the name, so that the same network comes out."""
    options: Any = getattr(backbone, "timm_options", {})
    return dict(options)


def name_of(arguments: Mapping[str, Any]) -> str:
    """What a backbone is called, by its arguments in ``backbone.json``: of a person's own the name of its class."""
    return str(arguments["name"] if is_ours(arguments) else arguments["_target_"])


def is_ours(arguments: Mapping[str, Any]) -> bool:
    """Whether `selfsight.backbones.registry.create` makes the backbone, and not a ``_target_`` of a person's own."""
    target = str(arguments.get("_target_", ""))
    return "." not in target or target == "selfsight.backbones.registry.create"


def to_torchvision(backbone: nn.Module, classifier: nn.Linear | None = None) -> dict[str, Tensor]:
    """State dict of a ResNet for ``torchvision.models.resnet*`` or ``wide_resnet*``, with ``strict=True``.

    Without ``classifier`` it holds no ``fc``: put ``net.fc = torch.nn.Identity()`` before loading. A network with
    ``stem="cifar"`` needs the same stem there: a 3x3 `conv1` of stride 1 and `maxpool = torch.nn.Identity()`. The
    features are the same, except that SimCLR's own ResNets pool even maps one pixel further on than torchvision.

    Raises:
        UserError: torchvision has no network with these parameters.
    """
    weights = state(backbone)
    layers = [1 + max(_blocks(weights, stage), default=-1) for stage in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in weights
    twin: dict[str, Tensor] = {}
    if min(layers) > 0 and getattr(weights.get("conv1.weight"), "ndim", 0) == 4:
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        width = weights["layer1.0.conv1.weight"].shape[0] if bottleneck else 64
        with torch.device("meta"):
            net = ResNet(Bottleneck if bottleneck else BasicBlock, layers, width_per_group=width)
            net.fc = nn.Identity()
        twin = net.state_dict()
    other = set(twin) ^ set(weights)
    other |= {k for k in twin if k in weights and k != "conv1.weight" and twin[k].shape != weights[k].shape}
    if other:
        name = type(unwrapped(backbone)).__name__
        raise UserError(
            f"This {name} has no counterpart in torchvision ('{min(other)}' differs); ResNets of the usual depths have."
        )
    if classifier is not None:
        weights |= {f"fc.{k}": v for k, v in state(classifier).items()}
    return weights


def to_detectron2(backbone: nn.Module) -> dict[str, Tensor]:
    """State dict of a ResNet under detectron2's names: ``stem.conv1.norm.weight``, ``res2.0.shortcut.weight``, ...

    For ``MODEL.RESNETS.DEPTH`` as the network's, ``STRIDE_IN_1X1: False``, ``INPUT.FORMAT: "RGB"``, and the mean and
    standard deviation the network was trained with, times 255. The same 318 entries for a ResNet-50 as the authors of
    PixPro make (transfer/detection/convert_pretrain_to_d2.py).

    Raises:
        UserError: torchvision has no such network, or its first convolution is not 7x7 as detectron2's is.
    """
    weights = to_torchvision(backbone)
    size = tuple(weights["conv1.weight"].shape[2:])
    if size != (7, 7):
        raise UserError(
            f"detectron2's ResNets begin with a 7 x 7 convolution and this one with {size[0]} x {size[1]}: pretrain "
            "with stem=imagenet to export for detectron2."
        )
    return {_detectron2_name(name): value for name, value in weights.items()}


def _detectron2_name(name: str) -> str:
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def export_detectron2(backbone: nn.Module, path: str | Path) -> Path:
    """Write the backbone as the pickle that ``MODEL.WEIGHTS`` of detectron2 takes; detectron2 need not be installed.

    Raises:
        UserError: see `to_detectron2`, or ``path`` cannot be written.
    """
    arrays = {name: value.numpy() for name, value in to_detectron2(backbone).items()}
    # matching_heuristics: detectron2 finds by itself under which prefix its model keeps the backbone
    content = {"model": arrays, "__author__": "selfsight", "matching_heuristics": True}
    replace(Path(path), lambda target: target.write_bytes(pickle.dumps(content)))
    return Path(path)


def export_onnx(backbone: nn.Module, path: str | Path, image_size: int, in_chans: int = 3) -> Path:
    """Write the backbone as ONNX: ``images [B, C, H, W]`` to ``features [B, num_features]``, B free.

    Raises:
        UserError: the extra packages are not installed, or ``path`` cannot be written.
    """
    if importlib.util.find_spec("onnxscript") is None:  # what torch.onnx needs; it needs onnx
        raise UserError("ONNX export needs two more packages: pip install 'selfsight[onnx]'.")
    net = unwrapped(backbone)
    weight = next(net.parameters())
    images = torch.zeros(2, in_chans, image_size, image_size, dtype=weight.dtype, device=weight.device)
    batch, training = torch.export.Dim("batch", min=1), net.training

    def write(target: Path) -> None:
        program = torch.onnx.export(
            net.eval(), (images,), input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: batch},), dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(target, include_initializers=True)

    try:
        replace(Path(path), write)
    finally:
        net.train(training)
    return Path(path)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path`` and move it there, so that no reader ever meets half a file.

    Raises:
        UserError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({error.strerror or error}); name a folder you may write."
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def _blocks(weights: Mapping[str, Tensor], stage: int) -> list[int]:
    prefix = f"layer{stage}."
    return [int(n) for k in weights if k.startswith(prefix) and (n := k[len(prefix) :].split(".")[0]).isdigit()]
