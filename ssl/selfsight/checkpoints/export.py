"""A trained backbone carried away: as safetensors with a description, for torchvision, timm, detectron2, as ONNX."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsight import __version__
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.files import replace

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
CHECKSUM = "sha256"  #: in the description, of the file of weights
WRAPS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
TRACED = 96  #: pixels that leave a network's last map more than one place: of a single one tracing learns no size
SMALL_STEMS = {"cifar": 1, "cifar_pad2": 2}  #: a ResNet's stem for small images: by how much its convolution pads


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
    weights = save(state(net), {"format": "pt"})
    description = {
        **spec,
        "num_features": net.num_features,
        "parameters": sum(p.numel() for p in net.parameters()),
        "selfsight": __version__,
        CHECKSUM: hashlib.sha256(weights).hexdigest(),
    }
    replace(folder / WEIGHTS, lambda path: path.write_bytes(weights))
    replace(folder / DESCRIPTION, lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))
    return folder / WEIGHTS


def unwrapped(backbone: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` and data-parallel training made of it, or the network itself."""
    inner: Any = backbone
    while (
        within := getattr(inner, "_orig_mod", None) or (inner.module if isinstance(inner, WRAPS) else None)
    ) is not None:
        inner = within
    assert isinstance(inner, nn.Module)
    return inner


def state(backbone: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU, plainly laid out, sharing no memory with the network; no name tells of `torch.compile`."""
    items = unwrapped(backbone).state_dict().items()
    plain = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in items}
    return {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in plain.items()}


def to_timm(backbone: nn.Module) -> dict[str, Tensor]:
    """State dict for ``timm.create_model(name, num_classes=0)`` with ``strict=True``.

    A network with ``stem="cifar"`` needs the same stem there: a 3x3 `conv1` of stride 1, and no `maxpool`.
    """
    return state(backbone)


def timm_call(backbone: nn.Module, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and options for which ``timm.create_model`` makes the same network; None where timm has none.

    The transformers of DINO, MAE and MoCo v3 are timm's, with positions and first weights of their own.
    """
    import timm

    from selfsight.backbones.registry import choices

    name, options = name_of(arguments), timm_options(backbone)
    if (own := re.fullmatch(r"vit_(tiny|small|base|large|huge)_(dino|mae|moco)", name)) is not None:
        patch = 14 if name == "vit_huge_mae" else 16
        name = f"vit_{own[1]}_patch{patch}_224"
        options = {"num_heads": 12, **options} if own[0] == "vit_small_moco" else options
    elif name in choices():
        return None
    return (name, options) if timm.is_model(name) else None


def export_timm(backbone: Backbone, arguments: Mapping[str, Any], path: str | Path) -> Path:
    """Write the backbone as safetensors for the network of timm that `timm_call` names.

    Args:
        arguments: those of `selfsight.backbones.registry.create`, as ``backbone.json`` has them.

    Raises:
        UserError: timm has no such network, or it has other layers there; or ``path`` cannot be written.
    """
    from safetensors.torch import save

    weights = check_timm(backbone, arguments)
    replace(Path(path), lambda target: target.write_bytes(save(weights, {"format": "pt"})))
    return Path(path)


def check_timm(backbone: Backbone, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """`to_timm`, once it is sure that timm's network has the same tensors.

    Raises:
        UserError: timm has no such network, or it has other layers there.
    """
    import timm

    from selfsight.backbones.registry import choices

    call, weights = timm_call(backbone, arguments), to_timm(backbone)
    if call is None:
        name = name_of(arguments)
        ours = name in choices()
        raise UserError(
            f"timm has no '{name}'{', which is a network of ours' * ours}; format=onnx, safetensors and hub take any "
            "network, torchvision ResNets of the usual depths."
        )
    name, options = call
    with torch.device("meta"):
        twin = timm.create_model(name, num_classes=0, **options).state_dict()
    other = set(twin) ^ set(weights) | {k for k in twin.keys() & weights.keys() if twin[k].shape != weights[k].shape}
    if str(arguments.get("stem")) in SMALL_STEMS:
        other.discard("conv1.weight")
    if other:
        raise UserError(
            f"timm's '{name}' has other layers than this one ('{min(other)}' differs); format=onnx, safetensors "
            "and hub take any network."
        )
    return weights


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
    """State dict of a ResNet for ``torchvision.models.resnet*``, ``wide_resnet*``, ``resnext*``, with ``strict=True``.

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

        width, groups = weights["layer1.0.conv1.weight"].shape[0] if bottleneck else 64, 1
        if bottleneck:
            inner = weights["layer1.0.conv2.weight"].shape
            groups = inner[0] // inner[1]
        with torch.device("meta"):
            block = Bottleneck if bottleneck else BasicBlock
            net = ResNet(block, layers, groups=groups, width_per_group=width // groups)
            net.fc = nn.Identity()
        twin = net.state_dict()
    other = set(twin) ^ set(weights)
    other |= {k for k in twin if k in weights and k != "conv1.weight" and twin[k].shape != weights[k].shape}
    if other:
        name = type(unwrapped(backbone)).__name__
        raise UserError(
            f"This {name} has no counterpart in torchvision ('{min(other)}' differs), as ResNets of the usual depths "
            "have (backbone=resnet18); format=onnx, safetensors and hub take any network."
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
            "with backbone.stem=imagenet to export for detectron2."
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


def export_onnx(backbone: nn.Module, path: str | Path, image_size: int, in_chans: int = 3) -> bool:
    """Write the backbone as ONNX: ``images [B, C, H, W]`` to ``features [B, num_features]``, B free.

    Returns:
        Whether H and W are free as well. They are where the network says the same of images of other sizes once it is
        traced, which is tried; networks that compute their padding from the size do not.

    Raises:
        UserError: the extra packages are not installed, ONNX has no word for a layer, or ``path`` cannot be written.
    """
    if importlib.util.find_spec("onnxscript") is None:  # what torch.onnx needs; it needs onnx
        raise UserError("ONNX export needs two more packages: pip install 'selfsight[onnx]'.")
    net = unwrapped(backbone)
    training = net.training
    net.eval()

    def write(target: Path) -> None:
        made = torch.onnx.export(traced, input_names=["images"], output_names=["features"], dynamo=True, verbose=False)
        assert made is not None
        made.save(target, include_initializers=True)

    try:
        with _quietly():
            traced, free = _traced(net, image_size, in_chans)
            replace(Path(path), write)
    except UserError:
        raise
    except Exception as error:  # of the tracer and the exporter, which have many
        cause = " ".join(str(error.__cause__ or error).split())[:160]
        raise UserError(
            f"ONNX cannot express this {type(net).__name__} ({cause}); format=safetensors takes any network."
        ) from error
    finally:
        net.train(training)
    return free


def _traced(net: nn.Module, image_size: int, in_chans: int) -> tuple[torch.export.ExportedProgram, bool]:
    """The network as a graph, with batch, height and width free; or with the batch alone, where sizes change it."""
    weight = next(net.parameters())

    def images(batch: int, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, in_chans, height, width, generator=generator).to(weight)

    def program(side: int, dims: Mapping[int, Any]) -> torch.export.ExportedProgram:
        return torch.export.export(net, (images(2, side, side),), dynamic_shapes=(dict(dims),), strict=False)

    free = torch.export.Dim.DYNAMIC
    try:
        found = program(image_size * math.ceil(TRACED / image_size), {0: free, 2: free, 3: free})
        graph = found.module(check_guards=False)  # ONNX keeps none: whether they matter is what is tried
        sizes = [(image_size + a, image_size + b) for a, b in ((0, 0), (1, 3), (2, 5), (32, 64))]
        taken = []
        for number, (height, width) in enumerate(sizes, 1):
            x = images(number, height, width)
            try:
                wanted = net(x)
            except (RuntimeError, AssertionError, ValueError):  # no size for this network, such as half a patch
                continue
            taken.append(torch.allclose(graph(x), wanted, atol=1e-4))
        if taken and all(taken):
            return found, True
    except Exception:  # of the tracer, which has many; what counts is whether the other way works
        pass
    return program(image_size, {0: free}), False


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the tracer's notes on what it could not solve."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _blocks(weights: Mapping[str, Tensor], stage: int) -> list[int]:
    prefix = f"layer{stage}."
    return [int(n) for k in weights if k.startswith(prefix) and (n := k[len(prefix) :].split(".")[0]).isdigit()]
