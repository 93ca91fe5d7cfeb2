"""The SimCLRv2 authors' TensorFlow checkpoints, as networks of ours.

Variables come as NumPy arrays by name, as `selfsight.checkpoints.tensorflow.read_bundle` gives them:

    variables = read_bundle("r50_1x_sk0/model.ckpt-250228")

The names number convolutions and BatchNorms separately, in the order in which resnet.py makes them: a block's shortcut
first, which is the order of our modules, too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.backbones.registry import create
from selfsight.backbones.simclr_resnet import DEPTHS, BasicBlock
from selfsight.checkpoints.format import Converted, Format, counters
from selfsight.errors import UserError
from selfsight.nn.simclr_head import ProjectionHead, ProjectionLayer

NORM_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


class Pretrained(NamedTuple):
    """What a checkpoint holds.

    ``spec`` are the arguments of `selfsight.backbones.registry.create` that make the backbone. Fine-tuned checkpoints
    keep the projector, supervised ones have none; the classifier of a pretrained one was trained along the way.
    """

    spec: dict[str, Any]
    backbone: nn.Module
    projector: ProjectionHead | None
    classifier: nn.Linear | None


def from_tensorflow(variables: Mapping[str, np.ndarray], *, ema: bool = False) -> Pretrained:
    """The networks whose weights ``variables`` are, in the type of the arrays.

    Args:
        variables: of a checkpoint of the authors' TensorFlow 1 code. Its step, optimiser slots and memory are ignored.
        ema: take the moving average that pretrained checkpoints hold beside the network.

    Raises:
        UserError: these are no such variables, or some are missing, left over, or of another shape.
    """
    prefix = "ema_model/" if ema else ""
    mine = {name.removeprefix(prefix): value for name, value in variables.items() if name.startswith(prefix)}
    found = _networks(architecture(mine), mine)
    for part, state in state_dicts(mine, found).items():
        module: nn.Module = getattr(found, part)
        module.to(next(iter(state.values())).dtype).load_state_dict(state, strict=False)  # all but num_batches_tracked
    return found


def _networks(spec: dict[str, Any], variables: Mapping[str, np.ndarray]) -> Pretrained:
    """The networks that variables belong to, as they are initialised."""
    projector = classifier = None
    names = [f"head_contrastive/nl_{j}/dense/kernel" for j in range(len(variables))]
    kernels = [variables[name] for name in names if name in variables]
    if kernels:
        projector = ProjectionHead(kernels[0].shape[0], kernels[-1].shape[1], len(kernels))
    if (kernel := variables.get("head_supervised/linear_layer/dense/kernel")) is not None:
        classifier = nn.Linear(*kernel.shape)
    return Pretrained(spec, create(**spec), projector, classifier)


def state_dicts(variables: Mapping[str, np.ndarray], target: Pretrained) -> dict[str, dict[str, Tensor]]:
    """``variables`` in PyTorch's layout under PyTorch's names, for each part of ``target``.

    Kernels of convolutions go from ``[h, w, in, out]`` to ``[out, in, h, w]``, those of dense layers are transposed.
    """
    names = variable_names(target)
    states: dict[str, dict[str, Tensor]] = {part: {} for part, _ in names.values()}
    shapes = {part: {k: v.shape for k, v in getattr(target, part).state_dict().items()} for part in states}
    missing = [name for name in names if name not in variables]
    over = [n for n in variables if re.match(r"(base_model|head_\w+)/", n) and n not in names and "Momentum" not in n]
    if missing or over:
        raise UserError(
            f"The checkpoint does not fit a {target.spec['name']}: {len(missing)} variables are missing and "
            f"{len(over)} left over, '{(missing + over)[0]}' for one."
        )
    for name, (part, key) in names.items():
        value = _laid_out(torch.from_numpy(np.array(variables[name])))
        if value.shape != shapes[part][key]:
            raise UserError(
                f"Variable '{name}' of the checkpoint has the shape {[*value.shape]} where a {target.spec['name']} has "
                f"{[*shapes[part][key]]}: it comes from another architecture."
            )
        states[part][key] = value
    return states


def _laid_out(value: Tensor) -> Tensor:
    """A kernel as PyTorch lays it out; all else as it is."""
    return (value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value).contiguous()


def variable_names(target: Pretrained) -> dict[str, tuple[str, str]]:
    """For every TensorFlow variable, in order of creation: the part of ``target`` and the name in its state dict."""
    names: dict[str, tuple[str, str]] = {}

    def add_norm(scope: str, part: str, key: str, norm: _BatchNorm) -> None:
        for theirs, ours in NORM_NAMES.items():
            if getattr(norm, ours) is not None:
                names[f"{scope}/{theirs}"] = (part, f"{key}.{ours}")

    convolutions, norms = itertools.count(), itertools.count()
    for key, module in target.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            names[f"base_model/{_numbered('conv2d', next(convolutions))}/kernel"] = ("backbone", f"{key}.weight")
        elif isinstance(module, _BatchNorm):
            add_norm(f"base_model/{_numbered('batch_normalization', next(norms))}", "backbone", key, module)
    for j, layer in enumerate(target.projector or ()):
        assert isinstance(layer, ProjectionLayer)
        names[f"head_contrastive/nl_{j}/dense/kernel"] = ("projector", f"{j}.linear.weight")
        add_norm(f"head_contrastive/nl_{j}/batch_normalization", "projector", f"{j}.bn", layer.bn)
    if target.classifier is not None:
        names["head_supervised/linear_layer/dense/kernel"] = ("classifier", "weight")
        names["head_supervised/linear_layer/dense/bias"] = ("classifier", "bias")
    return names


def architecture(variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `create` for the network that ``variables`` belong to, told by their number and shapes.

    Raises:
        UserError: it is none of the authors' networks.
    """
    places = {n: re.fullmatch(r"base_model/conv2d(?:_(\d+))?/kernel", n) for n in variables}
    found = {int(m[1] or 0): variables[n] for n, m in places.items() if m}
    if not found:
        raise UserError(
            "The checkpoint holds no variable 'base_model/conv2d/kernel', so it is none of SimCLR's TensorFlow 1 code."
        )
    kernels = [found[i] for i in sorted(found)]
    norms = sum(n.startswith("base_model/") and n.endswith("/gamma") for n in variables)
    selective = norms < len(kernels)
    for depth, (block, layers) in DEPTHS.items():
        basic = block is BasicBlock
        per_block = 2 if basic else 5 if selective else 3
        stem = len(kernels) - per_block * sum(layers) - len(layers)
        if stem == (3 if selective and kernels[0].shape[3] < kernels[2].shape[3] else 1) and not (basic and selective):
            features = kernels[-1].shape[3]
            last_fc1 = kernels[-3].shape  # of the last selective kernel: [1, 1, filters, middle]
            return {
                "name": f"simclr_resnet{depth}",
                "stem": "cifar" if stem == 1 and kernels[0].shape[0] == 3 else "imagenet",
                "in_chans": kernels[0].shape[2],
                "width": features // (512 if basic else 2048),
                "sk_ratio": last_fc1[3] / last_fc1[2] if selective else 0.0,
            }
    raise UserError(
        f"The checkpoint has {len(kernels)} convolutions and {norms} BatchNorms, as none of SimCLR's networks has."
    )


def _numbered(scope: str, i: int) -> str:
    return scope if i == 0 else f"{scope}_{i}"


class _TensorFlow(Format):
    """Variables are told by their place in the network, which is built first."""

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        variables = {name: value.numpy() for name, value in state.items()}
        spec = architecture(variables)
        with torch.device("meta"):
            target = _networks(spec, variables)
            names = variable_names(target)
            parts = state_dicts(variables, target)
        prefix = {"backbone": "backbone.", "projector": "projector.", "classifier": "classifier."}
        ours = {name: prefix[part] + key for name, (part, key) in names.items()}
        converted = Converted(spec=spec, names=ours)
        converted.state = counters({prefix[part] + k: v for part, found in parts.items() for k, v in found.items()})
        for name in (name for name in state if name not in names):
            variable = name.removesuffix("/Momentum")
            if name.endswith("/Momentum") and variable in names:
                converted.slots[ours[variable]] = {"momentum_buffer": _laid_out(state[name])}
            reason = next((why for pattern, why in self.unused if re.fullmatch(pattern, name)), None)
            if reason is None:
                converted.unknown.append(name)
            else:
                converted.leave_out(reason, [name])
        return converted


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    layers = sum(name.startswith("projector.") and name.endswith(".linear.weight") for name in state)
    return [
        f"method.projection_layers={layers}",
        f"method.projection_dim={len(state[f'projector.{layers - 1}.linear.weight'])}",
        f"method.online_classes={len(state['classifier.weight']) if 'classifier.weight' in state else 0}",
    ]


SIMCLR, SIMCLR_SUPERVISED = (
    _TensorFlow(
        name=name,
        project="google-research/simclr",
        marks=marks,
        rename=lambda name: None,
        unused=(
            (r".+/Momentum", "state of the optimiser"),
            (r"ema_model/.+", "a moving average beside the network"),
            (r"(.*/)?memory.*", "keys remembered from earlier batches"),
            (r"global_step.*", "records of the training"),
        ),
        method=method,
        settings=_settings,
        described={"image_size": 224, "mean": None, "std": None},  # values from 0 to 1, as they are
    )
    for name, method, marks in (
        ("SimCLR", "simclrv2", ("base_model/conv2d/kernel", "head_contrastive/nl_0/dense/kernel")),
        ("SimCLR's supervised network", None, ("base_model/conv2d/kernel",)),
    )
)
