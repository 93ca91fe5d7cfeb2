"""Projection and prediction heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from selfsight.nn.matryoshka import PrefixLinear

Layer = Callable[..., nn.Module]
RELU: Layer = partial(nn.ReLU, inplace=True)


def mlp(
    dims: Sequence[int],
    *,
    norm: Layer | None = None,
    last_norm: Layer | None = None,
    bias: bool = True,
    last_bias: bool = True,
    linear: Layer = nn.Linear,
    activation: Layer = RELU,
    of_features: bool = False,
) -> nn.Sequential:
    """Linear (- norm) - activation, repeated, and a last linear layer (- norm) without activation.

    Args:
        dims: widths from input to output; two of them make a single linear layer.
        norm, last_norm: called with the width (``nn.BatchNorm1d``); None leaves normalisation out.
        bias, last_bias: of the hidden and of the last linear layers.
        linear: called as ``linear(fan_in, fan_out, bias=...)``; a 1x1 convolution makes the same head for maps.
        activation: called without arguments.
        of_features: what comes in are features of a backbone, or their first ones alone, see `PrefixLinear`.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        made = PrefixLinear if of_features and i == 0 else linear
        layers.append(made(fan_in, fan_out, bias=last_bias if last else bias))
        make_norm = last_norm if last else norm
        if make_norm is not None:
            layers.append(make_norm(fan_out))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


def batch_norm_without_shift(dim: int) -> nn.BatchNorm1d:
    """BatchNorm with scale and no shift, the last layer of SimCLR's heads."""
    norm = nn.BatchNorm1d(dim)
    norm.register_parameter("bias", None)
    return norm


def batch_norm_without_affine(dim: int) -> nn.BatchNorm1d:
    """BatchNorm that only centres and scales: the last layer of SimSiam's and MoCo v3's projectors."""
    return nn.BatchNorm1d(dim, affine=False)


def pointwise_conv(fan_in: int, fan_out: int, bias: bool = True) -> nn.Conv2d:
    """1x1 convolution: the linear layer of heads on feature maps."""
    return nn.Conv2d(fan_in, fan_out, kernel_size=1, bias=bias)
