"""Classifiers on a frozen feature map, as RotNet's authors measure one (gidariss/FeatureLearningRotNet).

Each takes a map ``[B, C, h, w]`` and gives logits ``[B, K]``. All weights start as normal with variance 2 / fan-out
(kernel area times output channels), biases at 0.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from selfsight.nn.heads import mlp
from selfsight.nn.nin import conv_unit, nin_block

#: sides that AlexNet's maps are pooled to, so that each has about 9000 numbers
ALEXNET_POOLS = {"conv1": 12, "conv2": 7, "conv3": 5, "conv4": 6, "conv5": 6}


class LinearClassifier(nn.Module):
    """Adaptive pooling to ``side`` x ``side`` - BatchNorm without scale and shift - one linear layer.

    Args:
        pool: ``max`` or ``avg``.
    """

    def __init__(self, channels: int, num_classes: int, *, side: int, pool: Literal["max", "avg"] = "max") -> None:
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(side) if pool == "max" else nn.AdaptiveAvgPool2d(side)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.linear = nn.Linear(channels * side**2, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer sees, ``[B, C side side]``."""
        return self.norm(self.pool(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class NormalisedLinear(nn.Sequential):
    """BatchNorm without scale and shift, then a linear layer: the probe of MAE (main_linprobe.py), for ``[B, D]``.

    Features of masked modelling differ in size from one dimension to the next, which the norm takes out.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        linear = nn.Linear(features, num_classes)
        super().__init__(nn.BatchNorm1d(features, affine=False, eps=1e-6), linear)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)


class ConvClassifier(nn.Sequential):
    """A fresh block of NIN (3x3, 1x1, 1x1; 192 wide) - global mean - linear."""

    def __init__(self, channels: int, num_classes: int, *, width: int = 192) -> None:
        block = nin_block(channels, (width,) * 3, 3)
        super().__init__(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        initialise(self)


class MultLayerClassifier(nn.Sequential):
    """Flatten - two hidden layers with BatchNorm and ReLU - linear.

    Args:
        side: of the map, whose every number is an input.
        hidden: width; None: 20 times the classes, at most 2048.
    """

    def __init__(self, channels: int, num_classes: int, *, side: int, hidden: int | None = None) -> None:
        hidden = hidden or min(20 * num_classes, 2048)
        super().__init__(nn.Flatten(), batch_norm_mlp(channels * side**2, (hidden, hidden), num_classes))
        initialise(self)


class AlexNetClassifier(nn.Sequential):
    """The upper part of AlexNet: (one more convolution, 256 wide) - max-pooling - two layers of 4096 - linear.

    Args:
        side: of the map (13 for images of 224 pixels). conv: the further convolution, for probes on ``conv4``.
    """

    def __init__(self, channels: int, num_classes: int, *, side: int, conv: bool, hidden: int = 4096) -> None:
        first: list[nn.Module] = [conv_unit(channels, 256, 3)] if conv else []
        inputs = (256 if conv else channels) * ((side - 3) // 2 + 1) ** 2
        super().__init__(
            *first, nn.MaxPool2d(3, stride=2), nn.Flatten(), batch_norm_mlp(inputs, (hidden, hidden), num_classes)
        )
        initialise(self)


def batch_norm_mlp(inputs: int, hidden: tuple[int, ...], outputs: int, *, of_features: bool = False) -> nn.Sequential:
    """Linear without bias - BatchNorm - ReLU for each of ``hidden``, then linear with bias."""
    return mlp([inputs, *hidden, outputs], norm=nn.BatchNorm1d, bias=False, of_features=of_features)


def initialise(head: nn.Module) -> None:
    """Normal weights with variance 2 / fan-out, biases 0, in every convolution and linear layer."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:])
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
