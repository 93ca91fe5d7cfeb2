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

from selfsight.errors import UserError, nearest
from selfsight.nn.nin import avg_pool, max_pool, nin_block


class NIN(nn.Module):
    """
    Args:
        stages: number of blocks, at least 2.
        pool_third: average pooling after block 3 as well, where there are more than three (not in RotNet).
        num_classes: 0 for a backbone; else a ``classifier`` follows.
    """

    def __init__(self, stages: int, *, pool_third: bool, in_chans: int = 3, num_classes: int = 0) -> None:
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

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global mean, ``[B, 192]``; the classifier's logits where there is one and ``pre_logits`` is off."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def _create(stages: int, *, pretrained: bool, pool_third: bool = False, **options: Any) -> NIN:
    if pretrained:
        raise UserError("No pretrained weights exist for this NIN; leave backbone.pretrained at false.")
    known = ("pool_third", "in_chans", "num_classes")
    for name in [name for name in options if name not in known]:
        if options.pop(name):  # timm hands every model the same options; those at zero or None ask for nothing
            raise UserError(f"A NIN has no option '{name}'; it knows {', '.join(known)}.{nearest(name, known)}")
    return NIN(stages, pool_third=pool_third, **options)


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
