"""What the rooms hand to each other: a data loader its batches, a backbone its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:  # a backbone is an nn.Module and has the members below: two types at once, which Python cannot say
    from torch.nn import Module as Interface
else:
    Interface = Protocol


@runtime_checkable
class Backbone(Interface):  # type: ignore[misc]
    """A network without classifier: timm's interface. Nothing has to inherit from it.

    `selfsight.backbones.registry.create` gives one by name, `selfsight.backbones.interface.wrap` makes one of any
    module.

    Attributes:
        num_features: D, the width of a feature, and the channels of the last map.
        feature_info: of every stage from the stem upwards ``module`` (its name), ``num_chs`` (channels) and
            ``reduction`` (by how much its map is smaller than the image); empty where there are none to look at.
    """

    num_features: int
    feature_info: list[dict[str, Any]]
    if TYPE_CHECKING:
        spec: Mapping[str, Any]  # of one that `selfsight.load` has read: its description

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the last map in the network's own layout; `interface.feature_map` lays it out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to features ``[B, D]``."""
        raise NotImplementedError


@dataclass
class Batch:
    """Several views of the same ``B`` images.

    Attributes:
        views: one tensor ``[B, 3, H, W]`` per view, global views first, views of one size next to each other.
        indices: ``[B]`` int64, position of each image in its data set.
        labels: ``[B]`` int64, or None where the images have none.
        boxes: per view ``[B, 8]`` float32: ``top, left, height, width`` of the crop in source pixels, the source's
            ``H, W``, then ``hflip, vflip`` as 0 or 1. None where the views do not come from boxes.
    """

    views: list[Tensor]
    indices: Tensor
    labels: Tensor | None = None
    boxes: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``. Without this a trainer copies the batch field by field."""

        def move(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]

        indices, *labels = move([self.indices] if self.labels is None else [self.indices, self.labels])
        boxes = None if self.boxes is None else move(self.boxes)
        return Batch(move(self.views), indices, labels[0] if labels else None, boxes)


@dataclass
class SemiBatch:
    """A labelled and an unlabelled batch of one training step (the unlabelled one is ``mu`` times as large)."""

    labelled: Batch
    unlabelled: Batch

    def __len__(self) -> int:
        return len(self.unlabelled)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SemiBatch:
        """Both batches on ``device``."""
        return SemiBatch(self.labelled.to(device, non_blocking), self.unlabelled.to(device, non_blocking))
