"""What a data loader hands to a method: the contract between datamodules and methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
