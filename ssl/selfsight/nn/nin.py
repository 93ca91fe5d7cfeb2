"""The building block of Network in Network, as the authors of RotNet use it (gidariss/FeatureLearningRotNet)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def conv_unit(wide_in: int, wide_out: int, kernel: int) -> nn.Sequential:
    """Convolution of stride 1 that keeps the size, without bias - BatchNorm - ReLU. ``kernel`` is odd."""
    return nn.Sequential(
        nn.Conv2d(wide_in, wide_out, kernel, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(wide_out),
        nn.ReLU(inplace=True),
    )


def nin_block(wide_in: int, widths: Sequence[int], kernel: int) -> nn.Sequential:
    """A unit of the given kernel and width, then one with a 1x1 kernel for each further width."""
    units = [conv_unit(wide_in, widths[0], kernel)]
    units += [conv_unit(fan_in, fan_out, 1) for fan_in, fan_out in itertools.pairwise(widths)]
    return nn.Sequential(*units)


def max_pool() -> nn.MaxPool2d:
    """3x3 of stride 2, padded: ``n`` pixels become ``ceil(n / 2)``."""
    return nn.MaxPool2d(3, stride=2, padding=1)


def avg_pool() -> nn.AvgPool2d:
    """The same with means, in which the padding's zeros count."""
    return nn.AvgPool2d(3, stride=2, padding=1)
