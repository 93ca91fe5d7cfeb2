"""torchvision's ResNets with every layer wider, the stem included: SwAV's RN50w2 to w5, VICReg's resnet50x2.

timm's and torchvision's wide networks keep a first convolution of 64 channels, and are wider inside their blocks alone.
SimCLR's own, which are wide throughout, pad as TensorFlow does (`selfsight.backbones.simclr_resnet`).

    Code: facebookresearch/swav, src/resnet50.py; facebookresearch/vicreg, resnet.py.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from selfsight.errors import UserError

_INPUT = {"input_size": (3, 224, 224), "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({f"resnet{depth}_widened": _INPUT for depth in (50, 101, 200)})


class WidenedResNet(ResNet):
    """A ResNet of bottlenecks whose stem is ``width`` times as wide, as its blocks are."""

    def __init__(self, *args: Any, width: int, **kwargs: Any) -> None:
        kwargs["channels"] = tuple(64 * width * 2**i for i in range(4))
        super().__init__(*args, **kwargs)
        wide = 64 * width
        layer1: Any = self.layer1
        first = layer1[0]
        colours = next(self.conv1.parameters()).shape[1]
        self.conv1 = nn.Conv2d(colours, wide, 7, stride=2, padding=3, bias=False)  # type: ignore[assignment]
        self.bn1 = nn.BatchNorm2d(wide)
        first.conv1 = nn.Conv2d(wide, wide, 1, bias=False)
        first.downsample[0] = nn.Conv2d(wide, 4 * wide, 1, bias=False)
        for layer in (self.conv1, first.conv1, first.downsample[0]):
            kernel: Any = layer.weight
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        self.feature_info[0]["num_chs"] = wide


def _build(name: str, layers: tuple[int, ...], pretrained: bool, width: int, **kwargs: Any) -> WidenedResNet:
    if width < 1:
        raise UserError(f"{name} was given width {width}; it is how many times as wide as usual, 2 for SwAV's RN50w2.")
    net: WidenedResNet = build_model_with_cfg(
        WidenedResNet, name, pretrained, block=Bottleneck, layers=layers, width=width, **kwargs
    )
    return net


@register_model
def resnet50_widened(pretrained: bool = False, width: int = 2, **kwargs: Any) -> WidenedResNet:
    """4096 features and 94 million parameters at width 2."""
    return _build("resnet50_widened", (3, 4, 6, 3), pretrained, width, **kwargs)


@register_model
def resnet101_widened(pretrained: bool = False, width: int = 2, **kwargs: Any) -> WidenedResNet:
    """4096 features at width 2."""
    return _build("resnet101_widened", (3, 4, 23, 3), pretrained, width, **kwargs)


@register_model
def resnet200_widened(pretrained: bool = False, width: int = 2, **kwargs: Any) -> WidenedResNet:
    """4096 features at width 2."""
    return _build("resnet200_widened", (3, 24, 36, 3), pretrained, width, **kwargs)
