"""A ResNet-10 narrow enough to train on two CPU cores in a minute, for small images and quick trials."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

default_cfgs = generate_default_cfgs({"resnet10_slim": {"input_size": (3, 32, 32), "first_conv": "conv1.0"}})


@register_model
def resnet10_slim(pretrained: bool = False, width: int = 16, **kwargs: Any) -> ResNet:
    """Four stages of one basic block with ``width``, 2, 4 and 8 times ``width`` channels, and a three-layer stem."""
    architecture: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (width, 2 * width, 4 * width, 8 * width),
        "stem_type": "deep",
        "stem_width": width // 2,
    }
    net: ResNet = build_model_with_cfg(ResNet, "resnet10_slim", pretrained, **architecture, **kwargs)
    return net
