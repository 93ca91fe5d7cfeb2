"""Finer maps from the same weights: strides of the last stages replaced by dilation."""

from __future__ import annotations

import copy

from torch import nn

from selfsight.errors import UserError


def dilated(backbone: nn.Module, stages: int) -> nn.Module:
    """A copy whose last ``stages`` stages keep their resolution; every second cell of its map is the original's.

    The convolution that had the stride loses it, and those after it look twice as far. No parameter changes, so weights
    fit both ways.

    Raises:
        UserError: the network shrinks its maps by something else than odd convolutions there (pooling, patches).
    """
    network = copy.deepcopy(backbone)
    names = [info["module"] for info in getattr(backbone, "feature_info", [])]
    if not 0 <= stages < len(names):
        raise UserError(f"dilate is {stages}, and this backbone has {len(names)} stages, whose first keeps its stride.")
    factor = 1
    for name in names[len(names) - stages :]:
        factor = _dilate(network.get_submodule(name), factor)
    return network


def _dilate(stage: nn.Module, factor: int) -> int:
    """Spread the convolutions of a stage; returns the factor for what follows."""
    after = factor
    for name, part in stage.named_modules():
        if not isinstance(part, nn.Conv2d):
            is_layer = next(part.children(), None) is None
            if is_layer and getattr(part, "stride", 1) not in (1, (1, 1)):
                raise UserError(
                    f"{name} shrinks its map, and only convolutions can be dilated: take evaluator.dilate=0."
                )
            continue
        kernel, strided = part.kernel_size, max(part.stride) > 1
        if strided and (part.stride != (2, 2) or kernel[0] % 2 == 0):
            raise UserError(
                f"{name} has a kernel of {kernel[0]} and a stride of {part.stride[0]}: take evaluator.dilate=0."
            )
        if max(kernel) > 1:
            spread = factor if strided else after
            part.dilation = (spread * part.dilation[0], spread * part.dilation[1])
            part.padding = (part.dilation[0] * (kernel[0] // 2), part.dilation[1] * (kernel[1] // 2))
        if strided:
            part.stride, after = (1, 1), 2 * factor
    return after
