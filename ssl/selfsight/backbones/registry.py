"""Backbones by name: everything in timm, and ours registered beside it.

A backbone has timm's interface without a classifier: ``forward(x)`` gives ``[B, num_features]`` (the mean of the last
map, normalised where the network does so), ``forward_features(x)`` that map ``[B, num_features, h, w]``, and
``feature_info`` says of every stage its module, its channels and by how much it is smaller than the image. Sizes are
read, never found by trying an image.

A file in this folder adds a network with timm's ``@register_model``. If its function has an argument ``stem``, the
network builds its own small-image stem; otherwise `create` knows the one of timm's ResNets.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

import timm
from timm.models.resnet import ResNet
from torch import Tensor, nn

import selfsight.backbones
from selfsight.errors import UserError, nearest

STEMS = ("imagenet", "cifar", "cifar_pad2")


def create(
    name: str,
    *,
    stem: str = "imagenet",
    in_chans: int = 3,
    drop_path: float = 0.0,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """The network ``name`` without classifier, in training mode.

    Args:
        name: any name timm knows, a pretrained tag included, or one of ours.
        stem: ``imagenet`` is the network as it is; ``cifar`` starts a ResNet with a 3x3 convolution of stride 1 and
            padding 1 and no pooling, for images of about 32 pixels (Chen et al. 2020, appendix B.9); ``cifar_pad2``
            pads by 2, as solo-learn's networks do.
        in_chans: channels of the images.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 at the first.
        pretrained: start from timm's published weights (downloaded by timm).
        **kwargs: for the network's own constructor.

    Raises:
        UserError: unknown name or stem, a network without such a stem, or one that refuses an argument.
    """
    if not is_known(name):
        known = [*choices(), *timm.list_models()]
        raise UserError(f"There is no backbone '{name}', neither here nor in timm.{nearest(name, known)}")
    if stem not in STEMS:
        raise UserError(f"stem is '{stem}', and a stem is one of {', '.join(STEMS)}.{nearest(stem, STEMS)}")
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    own_stem = "stem" in inspect.signature(timm.model_entrypoint(name)).parameters and stem != "cifar_pad2"
    if own_stem:
        kwargs["stem"] = stem
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"The backbone '{name}' cannot be built with these arguments ({_one_line(error)}).") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"The weights of '{name}' are not to be had ({_one_line(error)}); use pretrained=false."
        ) from error
    if stem != "imagenet" and not own_stem:
        if not isinstance(net, ResNet):
            raise UserError(
                f"The backbone '{name}' has no stem for small images; stem={stem} is for ResNets, leave it out here."
            )
        _give_cifar_stem(net, in_chans, padding=2 if stem == "cifar_pad2" else 1)
    if getattr(net, "head_hidden_size", net.num_features) != net.num_features:
        _end_at_the_map(net)
    return net


def is_known(name: str) -> bool:
    """Whether `create` can build ``name``."""
    _register_ours()
    return bool(timm.is_model(name))


def choices() -> list[str]:
    """Names of the networks that are ours, sorted."""
    return sorted(name for module in _register_ours() for name in timm.list_models(module=module))


@functools.cache
def _register_ours() -> tuple[str, ...]:
    """Import every file of this folder, which registers what it defines; the names of the files."""
    names = tuple(
        found.name for found in pkgutil.iter_modules(selfsight.backbones.__path__) if found.name != "registry"
    )
    for name in names:
        importlib.import_module(f"selfsight.backbones.{name}")
    return names


def _give_cifar_stem(net: Any, in_chans: int, padding: int) -> None:
    net.conv1 = nn.Conv2d(in_chans, net.feature_info[0]["num_chs"], 3, padding=padding, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    for info in net.feature_info:
        info["reduction"] //= 2 if info["module"] == "act1" else 4


class _AveragePool(nn.Module):
    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))


def _end_at_the_map(net: nn.Module) -> None:
    """Drop the layers that some networks have between their last map and the classifier.

    They belong to the classifier they were designed with, and would go untrained wherever a method reads the map.
    """
    for layer in ("in_conv", "conv_head", "norm_head", "act2", "pre_classifier", "pre_logits"):
        if hasattr(net, layer):
            setattr(net, layer, nn.Identity())
    if hasattr(net, "head"):
        net.head = _AveragePool()
    net.head_hidden_size = net.num_features


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
