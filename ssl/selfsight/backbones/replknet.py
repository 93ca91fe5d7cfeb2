"""RepLKNet: a convolutional network with kernels of up to 31 x 31, whose units see as far as a transformer's.

A large depthwise kernel is trained beside one of 5 x 5, and their sum is what the block gives: the small one keeps the
optimisation easy, and could be added into the large one afterwards.

    Ding, Zhang, Zhou, Han, Ding, Sun: Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs.
    CVPR 2022, arXiv:2203.06717. Code: DingXiaoH/RepLKNet-pytorch.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn

from selfsight.backbones.interface import PooledNet, taken

KERNELS, DEPTHS, SMALL = (31, 29, 27, 13), (2, 2, 18, 2), 5


def conv_bn(
    wide_in: int, wide_out: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False, act: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d(wide_in, wide_out, kernel, stride, kernel // 2, groups=wide_in if depthwise else 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wide_out), *([nn.ReLU()] if act else []))


class LargeKernel(nn.Module):
    """Norm, 1x1, the large and the small depthwise kernel, 1x1; added to what came in."""

    def __init__(self, width: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.pw1 = conv_bn(width, width, act=True)
        self.large = conv_bn(width, width, kernel, depthwise=True)
        self.small = conv_bn(width, width, SMALL, depthwise=True)
        self.act = nn.ReLU()
        self.pw2 = conv_bn(width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.pw1(self.norm(x))
        return x + self.drop_path(self.pw2(self.act(self.large(inner) + self.small(inner))))


class FeedForward(nn.Module):
    """Norm, 1x1 to four times the width, GELU, 1x1 back; added to what came in."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.pw1, self.act, self.pw2 = conv_bn(width, 4 * width), nn.GELU(), conv_bn(4 * width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.act(self.pw1(self.norm(x)))))


class RepLKNet(PooledNet):
    """
    Args:
        width: channels of the first of four stages; each has twice as many as the one before.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        num_classes: 0 for a backbone; else a ``classifier`` follows.
    """

    def __init__(self, width: int, *, in_chans: int = 3, num_classes: int = 0, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(in_chans, width, 3, 2, act=True),
            conv_bn(width, width, 3, depthwise=True, act=True),
            conv_bn(width, width, act=True),
            conv_bn(width, width, 3, 2, depthwise=True, act=True),
        )
        rates = iter([drop_path_rate * i / (sum(DEPTHS) - 1) for i in range(sum(DEPTHS))])
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList([nn.Identity()])
        self.feature_info: list[dict[str, Any]] = []
        for i, (kernel, depth) in enumerate(zip(KERNELS, DEPTHS, strict=True)):
            wide = width * 2**i
            if i:
                self.transitions.append(
                    nn.Sequential(
                        conv_bn(wide // 2, wide, act=True), conv_bn(wide, wide, 3, 2, depthwise=True, act=True)
                    )
                )
            blocks: list[nn.Module] = []
            for rate in (next(rates) for _ in range(depth)):
                blocks += [LargeKernel(wide, kernel, rate), FeedForward(wide, rate)]
            self.stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": wide, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.norm = nn.BatchNorm2d(wide)
        self.num_features = wide
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, num_features, h, w]``, normalised."""
        x = self.stem(x)
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            x = stage(transition(x))
        return self.norm(x)


def _create(width: int, *, pretrained: bool, **options: Any) -> RepLKNet:
    known = ("in_chans", "num_classes", "drop_path_rate")
    return RepLKNet(width, **taken("a RepLKNet", known, pretrained, options))


@register_model
def replknet_31b(pretrained: bool = False, **options: Any) -> RepLKNet:
    """1024 features, 78.8 million parameters."""
    return _create(128, pretrained=pretrained, **options)


@register_model
def replknet_31l(pretrained: bool = False, **options: Any) -> RepLKNet:
    """1536 features, 171.1 million parameters."""
    return _create(192, pretrained=pretrained, **options)
