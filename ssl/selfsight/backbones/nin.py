"""Network in Network for images of 32 pixels, as rotation prediction was published with it.

Blocks of a large convolution and two of 1x1, 192 wide; the first two halve the map. Which block's features transfer
best depends on the task: for rotation prediction it is the second, not the last, so every block is a stage of its own.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations. ICLR 2018,
    arXiv:1803.07728. Code: gidariss/FeatureLearningRotNet, architectures/NetworkInNetwork.py.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from selfsight.backbones.interface import PooledNet, taken
from selfsight.errors import UserError
from selfsight.nn.nin import avg_pool, max_pool, nin_block


class NIN(PooledNet):
    """
    Args:
        stages: number of blocks, at least 2.
        pool_third: average pooling after block 3 as well, where there are more than three (not in RotNet).
        num_classes: 0 for a backbone; else a ``classifier`` follows.
    """

    def __init__(self, stages: int, *, pool_third: bool = False, in_chans: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        if stages < 2:
            raise UserError(f"A NIN of {stages} blocks was asked for; it has at least 2, RotNet's has 4.")
        blocks = [
            nn.Sequential(nin_block(in_chans, (192, 160, 96), 5), max_pool()),
            nn.Sequential(nin_block(96, (192, 192, 192), 5), avg_pool()),
            *(nn.Sequential(nin_block(192, (192, 192, 192), 3)) for _ in range(2, stages)),
        ]
        if pool_third and stages > 3:
            blocks[2].append(avg_pool())
        self.feature_info: list[dict[str, Any]] = []
        reduction = 1
        for i, block in enumerate(blocks, 1):
            self.add_module(f"conv{i}", block)
            reduction *= 2 if len(block) > 1 else 1
            self.feature_info.append({"num_chs": 96 if i == 1 else 192, "reduction": reduction, "module": f"conv{i}"})
        self.num_features = 192
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, 192, h, w]``."""
        for info in self.feature_info:
            x = self.get_submodule(info["module"])(x)
        return x


def _create(stages: int, *, pretrained: bool, **options: Any) -> NIN:
    options = taken("a NIN", ("pool_third", "in_chans", "num_classes"), pretrained, options)
    return NIN(stages, **options)


@register_model
def nin3(pretrained: bool = False, **options: Any) -> NIN:
    """Three blocks, 1.0 million parameters: the supervised network RotNet is compared with."""
    return _create(3, pretrained=pretrained, **options)


@register_model
def nin4(pretrained: bool = False, **options: Any) -> NIN:
    """Four blocks, 1.4 million parameters: RotNet on CIFAR-10."""
    return _create(4, pretrained=pretrained, **options)


@register_model
def nin5(pretrained: bool = False, **options: Any) -> NIN:
    """Five blocks, 1.8 million parameters."""
    return _create(5, pretrained=pretrained, **options)
