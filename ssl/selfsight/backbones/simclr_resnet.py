"""The ResNets of SimCLR and SimCLRv2: any width, selective kernels, and TensorFlow's padding where it matters.

Chen et al. 2020 (arXiv 2006.10029); google-research/simclr, resnet.py. What sets them apart from torchvision's:

- the first block of every stage has a projection on its shortcut, in ResNet-18 and 34 too;
- the 3x3 max-pool of stride 2 starts at the first pixel of an even map, not one before it;
- with selective kernels (``sk_ratio > 0``) the 3x3 convolution of a bottleneck becomes a `SelectiveKernel`, shortcuts
  pool before they project (ResNet-D), and the stem is three 3x3 convolutions;
- kernels start from a truncated normal of variance 1 / fan_in, the last BatchNorm of a block from zero;
- running variances are the biased ones (`selfsight.nn.batchnorm`).

Parameter names are torchvision's wherever torchvision has the layer, so that a network without selective kernels and
with bottlenecks loads into torchvision's or timm's of the same depth. Images are expected in [0, 1], not standardised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.batchnorm import BiasedBatchNorm2d

Norm = Callable[[int], Any]

#: standard deviation of a unit normal cut at two standard deviations
TRUNCATED_STD = 0.87962566103423978


def conv(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, SAME size at stride 1, with the authors' initial weights."""
    layer = nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)
    std = layer.weight[0].numel() ** -0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


class SamePool(nn.Module):
    """3x3 max-pool of stride 2 on non-negative maps, ``[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]``.

    The padding is TensorFlow's SAME: on an even side it is all at the end, on an odd one it is one at either end.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


class ShortcutPool(nn.Module):
    """2x2 average before the projection of a shortcut (ResNet-D), at stride 1 or 2, SAME size.

    At stride 2 an odd side gains a row of zeros that count; at stride 1 the windows at the end only average what there
    is (resnet.py, the shortcut of blocks with ``sk_ratio > 0``).
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2, 2)


class SelectiveKernel(nn.Module):
    """Two feature maps mixed channel by channel with weights from their pooled sum (Li et al. 2019, as in resnet.py).

    ``[B, fan_in, H, W] -> [B, filters, H / stride, W / stride]``. Both maps come from one 3x3 convolution.

    Args:
        sk_ratio, min_dim: the weights pass through ``max(filters sk_ratio, min_dim)`` channels.
    """

    def __init__(
        self,
        fan_in: int,
        filters: int,
        stride: int,
        sk_ratio: float,
        min_dim: int = 32,
        norm_layer: Norm = BiasedBatchNorm2d,
    ) -> None:
        super().__init__()
        middle = max(int(filters * sk_ratio), min_dim)
        self.conv = conv(fan_in, 2 * filters, 3, stride)
        self.bn = norm_layer(2 * filters)
        self.fc1 = conv(filters, middle, 1)
        self.fc1_bn = norm_layer(middle)
        self.fc2 = conv(middle, 2 * filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.bn(self.conv(x))).unflatten(1, (2, -1))  # [B, 2, F, H, W]
        pooled = maps.sum(1).mean((2, 3), keepdim=True)  # [B, F, 1, 1]
        logits = self.fc2(F.relu(self.fc1_bn(self.fc1(pooled)))).unflatten(1, (2, -1))  # [B, 2, F, 1, 1]
        return (maps * logits.softmax(1)).sum(1)


class Block(nn.Module):
    """What both residual blocks share: the shortcut, and the sum with it."""

    expansion: int

    def __init__(
        self, fan_in: int, filters: int, stride: int, project: bool, sk_ratio: float, drop_path: float, norm_layer: Norm
    ) -> None:
        super().__init__()
        self.downsample: nn.Sequential | None = None
        if project:
            fan_out = filters * self.expansion
            pooled = [ShortcutPool(stride)] if sk_ratio > 0 else []
            self.downsample = nn.Sequential(
                *pooled, conv(fan_in, fan_out, 1, 1 if pooled else stride), norm_layer(fan_out)
            )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.drop_path(self.residual(x)) + shortcut)


class BasicBlock(Block):
    """Two 3x3 convolutions. ``project`` puts a 1x1 convolution on the shortcut."""

    expansion = 1

    def __init__(
        self,
        fan_in: int,
        filters: int,
        stride: int = 1,
        project: bool = False,
        sk_ratio: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Norm = BiasedBatchNorm2d,
    ) -> None:
        super().__init__(fan_in, filters, stride, project, sk_ratio, drop_path, norm_layer)
        self.conv1, self.bn1 = conv(fan_in, filters, 3, stride), norm_layer(filters)
        self.conv2, self.bn2 = conv(filters, filters, 3), norm_layer(filters)
        nn.init.zeros_(self.bn2.weight)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3 (of ``stride``) and 1x1 convolution; with ``sk_ratio`` the 3x3 one is a `SelectiveKernel`."""

    expansion = 4

    def __init__(
        self,
        fan_in: int,
        filters: int,
        stride: int = 1,
        project: bool = False,
        sk_ratio: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Norm = BiasedBatchNorm2d,
    ) -> None:
        super().__init__(fan_in, filters, stride, project, sk_ratio, drop_path, norm_layer)
        self.conv1, self.bn1 = conv(fan_in, filters, 1), norm_layer(filters)
        if sk_ratio > 0:
            self.conv2: nn.Module = SelectiveKernel(filters, filters, stride, sk_ratio, norm_layer=norm_layer)
            self.bn2: nn.Module | None = None
        else:
            self.conv2, self.bn2 = conv(filters, filters, 3, stride), norm_layer(filters)
        self.conv3, self.bn3 = conv(filters, 4 * filters, 1), norm_layer(4 * filters)
        nn.init.zeros_(self.bn3.weight)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv2(x) if self.bn2 is None else F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class SimCLRResNet(nn.Module):
    """``[B, in_chans, H, W] -> [B, num_features]``, with timm's interface.

    Args:
        block, layers: kind of block and how many of them each of the four stages has.
        width: multiplies all channels, the stem's included.
        sk_ratio: above 0 for selective kernels (0.0625 in the paper); bottlenecks only.
        stem: ``cifar`` is one 3x3 convolution of stride 1 without pooling.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        norm_layer: called with the number of channels; ``nn.BatchNorm2d`` for PyTorch's running variance.

    Raises:
        UserError: selective kernels asked for in a network of basic blocks.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        width: int = 1,
        sk_ratio: float = 0.0,
        stem: str = "imagenet",
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        norm_layer: Norm = BiasedBatchNorm2d,
    ) -> None:
        super().__init__()
        if sk_ratio > 0 and block is BasicBlock:
            raise UserError("Selective kernels (sk_ratio > 0) need bottlenecks: take depth 50, 101, 152 or 200.")
        channels = 64 * width
        self.conv1 = _stem(stem, in_chans, channels, deep=sk_ratio > 0, norm_layer=norm_layer)
        self.bn1 = norm_layer(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else SamePool()
        reduction = 1 if stem == "cifar" else 2
        self.feature_info: list[dict[str, Any]] = [{"num_chs": channels, "reduction": reduction, "module": "act1"}]
        reduction = 1 if stem == "cifar" else 4
        built, rate_per_block = 0, drop_path_rate / max(1, sum(layers) - 1)
        for stage, length in enumerate(layers):
            filters, stride = 64 * width * 2**stage, 1 if stage == 0 else 2
            blocks: list[nn.Module] = []
            for i in range(length):
                first, rate = i == 0, rate_per_block * built
                blocks.append(block(channels, filters, stride if first else 1, first, sk_ratio, rate, norm_layer))
                channels, built = filters * block.expansion, built + 1
            reduction *= stride
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{stage + 1}"})
        self.num_features = self.head_hidden_size = channels
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Another classifier (0: none). ``global_pool`` is ``avg``, or empty for the map itself."""
        self.num_classes, self.global_pool = num_classes, global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map ``[B, num_features, h, w]``."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, stage)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stem(stem: str, in_chans: int, channels: int, *, deep: bool, norm_layer: Norm) -> nn.Module:
    if stem == "cifar":
        return conv(in_chans, channels, 3)
    if not deep:
        return conv(in_chans, channels, 7, 2)
    half = channels // 2
    first = [conv(in_chans, half, 3, 2), norm_layer(half), nn.ReLU(inplace=True)]
    second = [conv(half, half, 3), norm_layer(half), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second, conv(half, channels, 3))


DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}

_INPUT = {"input_size": (3, 224, 224), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}
default_cfgs = generate_default_cfgs({f"simclr_resnet{depth}": {**_INPUT, "first_conv": "conv1"} for depth in DEPTHS})


def _build(depth: int, pretrained: bool, stem: str, **kwargs: Any) -> SimCLRResNet:
    block, layers = DEPTHS[depth]
    name = f"simclr_resnet{depth}"
    net: SimCLRResNet = build_model_with_cfg(
        SimCLRResNet, name, pretrained, block=block, layers=layers, stem=stem, **kwargs
    )
    return net


@register_model
def simclr_resnet18(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(18, pretrained, stem, **kwargs)


@register_model
def simclr_resnet34(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(34, pretrained, stem, **kwargs)


@register_model
def simclr_resnet50(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(50, pretrained, stem, **kwargs)


@register_model
def simclr_resnet101(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(101, pretrained, stem, **kwargs)


@register_model
def simclr_resnet152(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(152, pretrained, stem, **kwargs)


@register_model
def simclr_resnet200(pretrained: bool = False, stem: str = "imagenet", **kwargs: Any) -> SimCLRResNet:
    return _build(200, pretrained, stem, **kwargs)
