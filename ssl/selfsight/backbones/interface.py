"""timm's interface for the networks that stand here because timm has none like them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.errors import UserError, nearest


class PooledNet(nn.Module):
    """A network whose feature is the mean of its last map, with a linear ``classifier`` where there are classes.

    A subclass sets ``num_features``, ``feature_info`` and the classifier (`reset_classifier`), and gives the map.
    """

    num_features: int
    feature_info: list[dict[str, Any]]
    drop_rate = 0.0  # of the pooled feature

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, num_features, h, w]``."""
        raise TypeError(f"{type(self).__name__} has to define forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global mean, ``[B, num_features]``; the classifier's logits where there is one and ``pre_logits`` is off."""
        pooled = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier; 0 classes: none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def freeze_beyond_the_map(backbone: nn.Module) -> None:
    """Freeze what `forward_features` does not use, such as a norm after pooling.

    A method that reads maps alone gives it no gradient, and data-parallel training would wait for one. Found on a copy
    without memory.
    """
    twin = copy.deepcopy(backbone).to("meta").requires_grad_(True)
    last: Tensor = twin.forward_features(torch.empty(2, 3, 224, 224, device="meta"))  # type: ignore[operator]
    if last.requires_grad:
        last.sum().backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is None:
            backbone.get_parameter(name).requires_grad_(False)


def taken(kind: str, known: Collection[str], pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options among ``known``. timm hands every model the same ones; those at zero or None ask for nothing.

    Args:
        kind: of the network, with its article, for the sentence.

    Raises:
        UserError: an option the network does not have, or pretrained weights, which do not exist.
    """
    if pretrained:
        raise UserError(f"No pretrained weights exist for {kind}; leave backbone.pretrained at false.")
    for name, value in options.items():
        if value and name not in known:
            raise UserError(f"{kind} has no option '{name}'; it knows {', '.join(known)}.{nearest(name, known)}")
    return {name: value for name, value in options.items() if name in known}
