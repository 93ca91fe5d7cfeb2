"""SimCLR and SimCLRv2: views of one image attract each other, views of different images repel each other.

Two random views of every image pass one network and a projection head; the loss asks of each projection to find the
other view of its image among all others in the batch. What augmentation changes is thereby unlearned, what it keeps
stays. SimCLRv2 makes the network larger and the head deeper, so that fine-tuning can start from inside it.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations. ICML 2020,
    arXiv 2002.05709.
    Chen, Kornblith, Swersky, Norouzi, Hinton: Big Self-Supervised Models are Strong Semi-Supervised Learners. NeurIPS
    2020, arXiv 2006.10029. Code: google-research/simclr, objective.py and model_util.py.

Where paper and code differ, the code is followed: the loss is the sum of both views' means, twice the paper's
(``reduction``), and there is no memory (``memory`` adds the paper's: keys of a moving average as further negatives).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.ntxent import REDUCTIONS, contrast_accuracy, contrast_entropy, cross_view_logits, ntxent, unit
from selfsight.methods.base import Method
from selfsight.methods.online_probe import OnlineProbe
from selfsight.nn.ema import EMATeacher
from selfsight.nn.precision import float32
from selfsight.nn.queue import Queue
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.optim.groups import ParamGroup, split_no_decay
from selfsight.validation import SHARE, above, at_least, one_of, takes, whole


@takes(
    temperature=above(0), projection_dim=whole(1), projection_layers=whole(1), reduction=one_of(*REDUCTIONS),
    chunk_size=whole(1), memory=whole(0), memory_momentum=SHARE, online_classes=whole(0), classifier_decay=at_least(0),
)  # fmt: skip
class SimCLRv2(Method):
    """Contrastive learning of representations: the two views of an image are to be the most similar pair of a batch.

    Defaults are SimCLRv2's for ImageNet; SimCLR has 2 layers in its head.

    Args:
        backbone: network to be trained.
        temperature: tau; 0.1 for ImageNet, 0.5 or 0.2 for CIFAR-10 (authors' README; their issue 166).
        projection_dim: width of the projections z.
        projection_layers: of the head g.
        reduction: ``sum_of_means`` (code) or ``mean_2n`` (paper), half of it; see `ntxent`.
        chunk_size: anchors handled at a time in the loss, or None for all of them.
        memory: number of keys remembered from earlier batches; 0 for none.
        memory_momentum: of the average network that makes the keys; 0.999 in the paper.
        online_classes: above 0 trains a linear classifier of that many classes on the detached features along the way,
            see `OnlineProbe`.
        classifier_decay: L2 on that classifier's kernel, as a term of the loss.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, 2)
    across_images = "the negatives of an image are the other images of its batch"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        projection_dim: int = 128,
        projection_layers: int = 3,
        reduction: Literal["sum_of_means", "mean_2n"] = "sum_of_means",
        chunk_size: int | None = None,
        memory: int = 0,
        memory_momentum: float = 0.999,
        online_classes: int = 0,
        classifier_decay: float = 1e-4,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.reduction, self.chunk_size = temperature, reduction, chunk_size
        width: int = backbone.num_features  # type: ignore[assignment]
        self.projector = ProjectionHead(width, projection_dim, projection_layers)
        self.average = EMATeacher(self.network, memory_momentum, "keep") if memory else None
        self.memory = Queue(memory, projection_dim, unit=True) if memory else None
        self.classifier = OnlineProbe(width, online_classes, classifier_decay) if online_classes else None

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x = torch.cat(batch.views)  # [2B, 3, H, W]: one pass, so that BatchNorm sees both views
        h = self.backbone(x)  # [2B, D]
        z1, z2 = self.projector(h).chunk(2)  # [B, d] each
        loss = self.loss(z1, z2)
        self.remember(x)
        found = {"loss": loss, **self.monitors(z1, z2)}
        return found if self.classifier is None else self.classifier.add_to(found, h, batch.labels)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """NT-Xent of projections ``[B, d]``, the remembered keys among the negatives."""
        negatives = None if self.memory is None else self.memory.rows()  # [K, d]
        options: dict[str, Any] = {"reduction": self.reduction, "chunk_size": self.chunk_size, "memory": negatives}
        return ntxent(z1, z2, temperature=self.temperature, **options)

    def chance_loss(self) -> float:
        """All projections agree, or none does more than by chance: 2 ln(2N - 1) for N images on all processes."""
        candidates = 2 * self.clock.batch_size - 1 + (0 if self.memory is None else len(self.memory))
        return (2 if self.reduction == "sum_of_means" else 1) * math.log(candidates)

    def param_groups(self) -> list[ParamGroup]:
        """The online classifier is neither decayed nor layer-adapted by the optimiser (lars_optimizer.py)."""
        return split_no_decay(self, plain_names=("classifier.",))

    def monitors(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """``contrast_accuracy`` and ``contrast_entropy`` among the images of the other view."""
        logits, labels = cross_view_logits(z1, z2, temperature=self.temperature)  # [B, N]
        return {
            "contrast_accuracy": contrast_accuracy(logits, labels),
            "contrast_entropy": contrast_entropy(logits),
        }

    # --- the memory of the paper -------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Sequential:
        """What makes a projection of an image."""
        return nn.Sequential(self.backbone, self.projector)

    def before_step(self) -> None:
        if self.average is not None:
            self.average.update(self.network)

    def remember(self, x: Tensor) -> None:
        """Keep the average network's keys of ``x [2B, 3, H, W]`` for the memory."""
        if self.average is not None:
            k1, k2 = unit(float32(self.average(x))).chunk(2)  # [B, d] each
            self.collect(k1=k1, k2=k2)

    def take_in(self, k1: Tensor, k2: Tensor) -> None:
        assert self.memory is not None
        for keys in (k1, k2):  # one view after the other, on any number of processes
            self.memory.push(keys)
