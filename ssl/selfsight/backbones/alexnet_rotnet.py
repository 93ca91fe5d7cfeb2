"""AlexNet with BatchNorm, as rotation prediction was published with it on ImageNet.

Five convolutions; the three fully connected layers belong to the task and are in its head. Stages are the outputs of
the convolutions before pooling, the ones published probes were put on.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations. ICLR 2018,
    arXiv:1803.07728. Code: gidariss/FeatureLearningRotNet, architectures/AlexNet.py.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from selfsight.backbones.interface import PooledNet, taken
from selfsight.errors import UserError

#: channels, kernel, stride, padding; whether a pooling follows
LAYERS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)

SMALLEST = 63  # pixels; less leaves nothing to the last pooling


class AlexNet(PooledNet):
    """``num_classes`` 0 is a backbone; else a linear ``classifier`` on the global mean follows."""

    def __init__(self, *, in_chans: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        self.feature_info: list[dict[str, Any]] = []
        width, reduction = in_chans, 1
        for i, (out, kernel, stride, padding, pooled) in enumerate(LAYERS, 1):
            conv = nn.Conv2d(width, out, kernel, stride, padding)
            self.add_module(f"conv{i}", nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
            self.add_module(f"pool{i}", nn.MaxPool2d(3, stride=2) if pooled else nn.Identity())
            reduction *= stride
            self.feature_info.append({"num_chs": out, "reduction": reduction, "module": f"conv{i}"})
            width, reduction = out, 2 * reduction if pooled else reduction
        self.num_features = width
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to the map after the last pooling, ``[B, 256, 6, 6]`` for 224 pixels."""
        if min(x.shape[-2:]) < SMALLEST:
            raise UserError(
                f"AlexNet was given images of {x.shape[-2]} x {x.shape[-1]} pixels and needs at least {SMALLEST}; take "
                "larger views, or another backbone such as nin."
            )
        for i in range(1, len(LAYERS) + 1):
            x = self.get_submodule(f"pool{i}")(self.get_submodule(f"conv{i}")(x))
        return x


@register_model
def alexnet_rotnet(pretrained: bool = False, **options: Any) -> AlexNet:
    """2.5 million parameters in the convolutions; images of at least 63 pixels."""
    return AlexNet(**taken("this AlexNet", ("in_chans", "num_classes"), pretrained, options))
