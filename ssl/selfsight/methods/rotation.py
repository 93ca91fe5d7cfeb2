"""Rotation prediction (RotNet): to tell which way up a picture is, a network has to know what it shows.

Every image is turned by 0, 90, 180 and 270 degrees, all four copies pass the network in one batch, and a small head
says by how much each was turned. The copies share one crop and flip and are made last, as an exact permutation of
pixels, so that nothing but the content gives the answer away. What transfers best lies in the middle of the network:
probe its stages.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations. ICLR 2018,
    arXiv:1803.07728. Code: gidariss/FeatureLearningRotNet.

Deviations: images are rotated after normalisation and on the device, which is equal; with other backbones than the
paper's the head is a linear layer on the global mean (as in facebookresearch/vissl).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from torch import Tensor, nn

from selfsight.backbones.interface import feature_map
from selfsight.contracts import Batch
from selfsight.losses.rotation import rotation_loss
from selfsight.methods.base import Method
from selfsight.nn.precision import float32
from selfsight.nn.probes import batch_norm_mlp
from selfsight.nn.rotate import rotate4
from selfsight.validation import one_of, takes, whole


@takes(hidden_dims=whole(1, empty=True), map_side=whole(1), decay=one_of("all", "kernels"))
class Rotation(Method):
    """Prediction of rotations: a small head says by which of four angles each copy of an image was turned.

    ``batch_size`` counts images: the network sees four times as many rows. Defaults are for ResNets; AlexNet, the
    paper's network for ImageNet, takes ``hidden_dims=[4096, 4096]`` and ``map_side=6``.

    Args:
        backbone: network to be trained.
        hidden_dims: widths of the head's hidden layers; AlexNet has two of 4096, NIN and ResNets none.
        map_side: the head sees the last map, max-pooled to this side and flattened (AlexNet: 6); None: its global mean.
        decay: ``all`` parameters (the authors) or ``kernels``, which spares biases and normalisation (vissl).

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (1, 1)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dims: Sequence[int] = (),
        map_side: int | None = None,
        decay: Literal["all", "kernels"] = "all",
    ) -> None:
        super().__init__(backbone)
        self.map_side, self.decay = map_side, decay
        width = cast(int, backbone.num_features) * (map_side or 1) ** 2
        self.pool = nn.Identity() if map_side is None else nn.AdaptiveMaxPool2d(map_side)
        self.head = batch_norm_mlp(width, tuple(hidden_dims), 4, of_features=map_side is None)

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x, y = rotate4(batch.views[0])  # [4B, 3, S, S], [4B]: 0, 1, 2, 3, 0, ...
        logits = self.logits(x)  # [4B, 4]
        loss = rotation_loss(logits, y)
        return {"loss": loss, "rotation_accuracy": (logits.detach().argmax(1) == y).to(loss.dtype).mean()}

    def logits(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` to scores ``[B, 4]`` of having been turned by 0, 90, 180, 270 degrees."""
        if self.map_side is None:
            return float32(self.head(self.backbone(x)))
        return float32(self.head(self.pool(feature_map(self.backbone, x)).flatten(1)))

    def chance_loss(self) -> float:
        """``ln 4``: every angle is as likely as the others."""
        return math.log(4)
