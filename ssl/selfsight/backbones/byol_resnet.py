"""ResNets padded as TensorFlow pads, for the weights that BYOL's authors published (google-deepmind/deepmind-research).

A convolution or pooling of stride 2 pads the right and the bottom more than the left and the top (``SAME``); weights
trained so lose several points where padding is even. The first block of every stage has a projection in its shortcut,
in ResNet-18 and 34 too.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

_NAMES = ("byol_resnet18", "byol_resnet34", "byol_resnet50", "byol_resnet101", "byol_resnet200")
default_cfgs = generate_default_cfgs({name: {"input_size": (3, 224, 224), "first_conv": "conv1"} for name in _NAMES})


class SamePaddingResNet(ResNet):
    """timm's ResNet with the padding of TensorFlow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages:
            block = stage[0]
            if block.downsample is None:
                c_in, c_out = block.conv1.in_channels, int(str(self.feature_info[1]["num_chs"]))
                block.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        for name, conv in list(self.named_modules()):
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                conv.__class__, conv.padding = Conv2dSame, (0, 0)
            elif isinstance(conv, nn.MaxPool2d):
                self.set_submodule(name, MaxPool2dSame(kernel_size=conv.kernel_size, stride=conv.stride))


def _build(name: str, block: Any, layers: tuple[int, ...], pretrained: bool, width: int, **options: Any) -> ResNet:
    channels = tuple(width * c for c in (64, 128, 256, 512))
    net: ResNet = build_model_with_cfg(
        SamePaddingResNet, name, pretrained, block=block, layers=layers, channels=channels, **options
    )
    return net


@register_model
def byol_resnet18(pretrained: bool = False, width: int = 1, **options: Any) -> ResNet:
    """ResNet-18 as BYOL's authors pad it."""
    return _build("byol_resnet18", BasicBlock, (2, 2, 2, 2), pretrained, width, **options)


@register_model
def byol_resnet34(pretrained: bool = False, width: int = 1, **options: Any) -> ResNet:
    """ResNet-34 as BYOL's authors pad it."""
    return _build("byol_resnet34", BasicBlock, (3, 4, 6, 3), pretrained, width, **options)


@register_model
def byol_resnet50(pretrained: bool = False, width: int = 1, **options: Any) -> ResNet:
    """ResNet-50 as BYOL's authors pad it; ``width=2`` doubles the channels of all stages."""
    return _build("byol_resnet50", Bottleneck, (3, 4, 6, 3), pretrained, width, **options)


@register_model
def byol_resnet101(pretrained: bool = False, width: int = 1, **options: Any) -> ResNet:
    """ResNet-101 as BYOL's authors pad it."""
    return _build("byol_resnet101", Bottleneck, (3, 4, 23, 3), pretrained, width, **options)


@register_model
def byol_resnet200(pretrained: bool = False, width: int = 1, **options: Any) -> ResNet:
    """ResNet-200 as BYOL's authors pad it; their largest has ``width=2``."""
    return _build("byol_resnet200", Bottleneck, (3, 24, 36, 3), pretrained, width, **options)
