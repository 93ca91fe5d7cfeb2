"""Wide residual networks as the semi-supervised literature trains them on CIFAR, SVHN and STL-10.

Published error rates of FixMatch and its family belong to this network with all its habits: LeakyReLU of slope 0.1,
BatchNorm that keeps 99.9 % of its running statistics, a bias in the first convolution, and the one below.

The habit called ``raw_shortcut``: where a stage after the first changes the width, its first unit feeds the *raw*
input to both of its branches. The BatchNorm in front is computed (its running statistics move) and its output is
dropped. ``raw_shortcut=False`` gives the network of Zagoruyko and Komodakis (BMVC 2016) instead, which normalises and
activates before both branches.

State-dict names are those of microsoft/Semi-supervised-learning (``conv1``, ``block1.layer.0.bn1`` ...), so weights
trained there load as they are (``classifier.*`` apart). Those networks come in three ``flavour``s, which differ in
biases and epsilons:

========== ============================ ========================= =================================
flavour    biases of 3x3 convolutions   epsilon of BatchNorm      source
========== ============================ ========================= =================================
usb        first one only               1e-5, last one 1e-3       microsoft/Semi-supervised-learning
torchssl   all convolutions             1e-3                      TorchSSL/TorchSSL
simmatch   none                         1e-5                      SimMatch family, CIFAR code
========== ============================ ========================= =================================
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.backbones.interface import PooledNet, taken
from selfsight.errors import UserError, nearest

SLOPE = 0.1
BN_MOMENTUM = 0.001  # torch's sense: the share of the new batch

#: bias of the first convolution, of the others; epsilon of the inner BatchNorms, of the last
FLAVOURS: dict[str, tuple[bool, bool, float, float]] = {
    "usb": (True, False, 1e-5, 1e-3),
    "torchssl": (True, True, 1e-3, 1e-3),
    "simmatch": (False, False, 1e-5, 1e-5),
}


class Unit(nn.Module):
    """Pre-activation residual unit; ``activate`` says whether a unit that changes the width activates both branches."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, *, activate: bool, bias: bool, eps: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide_in, eps=eps, momentum=BN_MOMENTUM)
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(wide_out, eps=eps, momentum=BN_MOMENTUM)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=bias)
        self.same_width = wide_in == wide_out
        self.activate = activate
        if not self.same_width:
            self.convShortcut = nn.Conv2d(wide_in, wide_out, 1, stride, bias=bias)
            # Scale and shift without use get no gradient; frozen, they do not keep DDP waiting for one.
            self.bn1.requires_grad_(activate)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.leaky_relu(self.bn1(x), SLOPE)
        if self.same_width:
            shortcut = x
        else:
            activated = activated if self.activate else x
            shortcut = self.convShortcut(activated)
        out = F.leaky_relu(self.bn2(self.conv1(activated)), SLOPE)
        return shortcut + self.conv2(out)


class Stage(nn.Module):
    """Units of one width; the first changes width and resolution."""

    def __init__(self, units: int, wide_in: int, wide_out: int, stride: int, **options: Any) -> None:
        super().__init__()
        widths = [wide_in] + [wide_out] * units
        self.layer = nn.Sequential(
            *(Unit(widths[i], widths[i + 1], stride if i == 0 else 1, **options) for i in range(units))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(PooledNet):
    """
    Args:
        depth: 6 n + 4, with n units a stage.
        widen: factor on the widths 16, 32, 64 (, 128) of the stages.
        stages: 3, or 4 for the network known as WRN-37-2 (which has depth 28 by the formula above).
        first_stride: stride of stage 1 (the four-stage network: 2 in USB, 1 in the SimMatch family).
        flavour: ``usb``, ``torchssl`` or ``simmatch`` (module docstring).
        raw_shortcut: the habit described above.
        num_classes: 0 for a backbone, which is the default everywhere here; else a ``classifier`` follows.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 2,
        *,
        stages: int = 3,
        first_stride: int = 1,
        flavour: str = "usb",
        raw_shortcut: bool = True,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"A wide ResNet of depth {depth} was asked for; the depth is 6 n + 4: 10, 16, 22, 28, ...")
        if flavour not in FLAVOURS:
            raise UserError(f"flavour is '{flavour}'; one of {', '.join(FLAVOURS)}.{nearest(flavour, FLAVOURS)}")
        first_bias, bias, eps, last_eps = FLAVOURS[flavour]
        widths = [16] + [16 * widen * 2**i for i in range(stages)]
        strides = [first_stride] + [2] * (stages - 1)
        self.num_features, self.num_classes, self.drop_rate = widths[-1], num_classes, drop_rate
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=first_bias)
        self.feature_info: list[dict[str, Any]] = []
        reduction = 1
        for i, stride in enumerate(strides):
            activate = i == 0 or not raw_shortcut
            stage = Stage((depth - 4) // 6, widths[i], widths[i + 1], stride, activate=activate, bias=bias, eps=eps)
            self.add_module(f"block{i + 1}", stage)
            reduction *= stride
            self.feature_info.append({"num_chs": widths[i + 1], "reduction": reduction, "module": f"block{i + 1}"})
        self.bn1 = nn.BatchNorm2d(widths[-1], eps=last_eps, momentum=BN_MOMENTUM)
        self.classifier = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, num_features, h, w]``, normalised and activated."""
        x = self.conv1(x)
        for i in range(len(self.feature_info)):
            x = self.get_submodule(f"block{i + 1}")(x)
        return F.leaky_relu(self.bn1(x), SLOPE)


def _create(depth: int, widen: int, *, pretrained: bool, **options: Any) -> WideResNet:
    known = ("stages", "first_stride", "flavour", "raw_shortcut", "in_chans", "num_classes", "drop_rate")
    return WideResNet(depth, widen, **taken("a wide ResNet", known, pretrained, options))


@register_model
def wrn_28_2(pretrained: bool = False, **options: Any) -> WideResNet:
    """Three stages of four units, 128 features, 1.5 million parameters: CIFAR-10 and SVHN."""
    return _create(28, 2, pretrained=pretrained, **options)


@register_model
def wrn_28_8(pretrained: bool = False, **options: Any) -> WideResNet:
    """Three stages, 512 features, 23 million parameters: CIFAR-100 in TorchSSL and the SimMatch papers."""
    return _create(28, 8, pretrained=pretrained, **options)


@register_model
def wrn_37_2(pretrained: bool = False, **options: Any) -> WideResNet:
    """Four stages, 256 features, 5.9 million parameters: STL-10. First stride 2 (USB); SimMatch-CIFAR takes 1."""
    return _create(28, 2, pretrained=pretrained, **{"stages": 4, "first_stride": 2, **options})
