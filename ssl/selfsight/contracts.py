"""What the rooms hand to each other: a data loader its batches, a backbone its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:  # a backbone is an nn.Module and has the members below: two types at once, which Python cannot say
    from torch.nn import Module as Interface

    T = TypeVar("T")

    def checkable(protocol: type[T]) -> type[T]:
        return protocol
else:
    Interface, checkable = Protocol, runtime_checkable


@checkable
class Backbone(Interface):
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


#: what the columns of `Targets` may be
MULTILABEL, REGRESSION = "multilabel", "regression"


@dataclass(frozen=True)
class Targets:
    """What is known of ``N`` images where that is not one class each: any number of labels, or numbers.

    Attributes:
        values: ``[N, T]`` float32; of labels 1 and 0. NaN where it is not known.
        names: of the T columns.
        kind: ``multilabel`` or ``regression``.
    """

    values: Tensor
    names: tuple[str, ...]
    kind: str

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Targets:
        """Those of some images (``[n]`` int64, or ``[N]`` bool)."""
        return replace(self, values=self.values[rows])

    def __str__(self) -> str:
        """``20 labels of which an image has any``, ``the numbers age, height``."""
        if self.kind == MULTILABEL:
            return f"{len(self.names)} labels of which an image has any"
        shown = ", ".join(self.names[:5]) + (", …" if len(self.names) > 5 else "")
        return f"the number{'s' * (len(self.names) > 1)} {shown}"

    @property
    def known(self) -> Tensor:
        """``[N]`` bool: images of which anything is known."""
        return ~self.values.isnan().all(dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return replace(self, values=self.values.to(device, non_blocking=non_blocking))

    def unknown(self, images: int) -> Targets:
        """The same columns for images of which nothing is known."""
        return replace(self, values=self.values.new_full((images, len(self.names)), torch.nan))

    @staticmethod
    def joined(parts: Sequence[Targets]) -> Targets:
        """Those of several sets of images, with the same columns, one after the other."""
        return replace(parts[0], values=torch.cat([part.values for part in parts]))


@dataclass
class Batch:
    """Several views of the same ``B`` images.

    Attributes:
        views: one tensor ``[B, 3, H, W]`` per view, global views first, views of one size next to each other.
        indices: ``[B]`` int64, position of each image in its data set.
        labels: ``[B]`` int64, or None where the images have none.
        boxes: per view ``[B, 8]`` float32: ``top, left, height, width`` of the crop in source pixels, the source's
            ``H, W``, then ``hflip, vflip`` as 0 or 1. None where the views do not come from boxes.
        targets: of the ``B`` images, where they have several labels or numbers in place of a class.
    """

    views: list[Tensor]
    indices: Tensor
    labels: Tensor | None = None
    boxes: list[Tensor] | None = None
    targets: Targets | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``. Without this a trainer copies the batch field by field."""

        def move(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]

        indices, *labels = move([self.indices] if self.labels is None else [self.indices, self.labels])
        boxes = None if self.boxes is None else move(self.boxes)
        targets = None if self.targets is None else self.targets.to(device, non_blocking)
        return Batch(move(self.views), indices, labels[0] if labels else None, boxes, targets)


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
