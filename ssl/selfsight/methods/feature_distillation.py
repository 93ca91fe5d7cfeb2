"""Distillation without labels: a student of any kind learns the features of a trained network that stays as it is.

The teacher's features are no classes, so the student is asked where they lie: their direction (cosine), place by place
of the last map, or, as SEED does, how similar an image is to many others the teacher has seen. That asks less of a
small network than the features themselves.

    Fang, Wang, Wang, Zhang, Yang, Liu: SEED: Self-supervised Distillation for Visual Representation. ICLR 2021,
    arXiv:2101.04731. Code: jacobswan1/SEED.

Deviation: the queue takes in a step's embeddings after the optimiser's step; an image's own stands beside it, as in the
paper's equation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.interface import feature_map
from selfsight.checkpoints.teacher import FeatureTable, FrozenTeacher, network_called
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.feature_distillation import cosine_distance, similarity_distillation
from selfsight.methods.base import Method
from selfsight.nn.heads import mlp, pointwise_conv
from selfsight.nn.queue import Queue
from selfsight.validation import above, takes, whole


@takes(student_temperature=above(0), teacher_temperature=above(0), queue_length=whole(1))
class FeatureDistillation(Method):
    """A student learns a frozen network's features without labels: their directions, or what they are similar to.

    Teacher and student see the same view; of several views, each for itself. A teacher whose features do not depend on
    the view is asked once for each image, before the training (`shown_once`).

    Args:
        backbone: the student's.
        mean: of the student's images, with which they were normalised.
        std: of the student's images, with which they were normalised.
        teacher: a trained backbone, or where one is: a run or backbone folder, a checkpoint of others, a network of
            timm, ``hf-hub:PERSON/MODEL``. It is shown images of its own size and normalisation.
        loss: ``similarity`` (SEED), ``cosine`` of pooled features, or ``maps``: the cosine at each place of the last
            map.
        teacher_sees: each ``view`` that the student sees, or the ``image`` itself, as evaluation shows it, for all of
            its views.
        student_temperature: tau_S of ``similarity``.
        teacher_temperature: tau_T of ``similarity``.
        queue_length: K, earlier images whose similarity counts in ``similarity``.

    Raises:
        UserError: there is no teacher, or it cannot be had; ``maps`` of an image that the student sees in views.
    """

    needs = ("mean", "std")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        teacher: nn.Module | str | None = None,
        loss: Literal["similarity", "cosine", "maps"] = "similarity",
        teacher_sees: Literal["view", "image"] = "view",
        student_temperature: float = 0.2,
        teacher_temperature: float = 0.01,
        queue_length: int = 65536,
    ) -> None:
        super().__init__(backbone)
        if teacher is None:
            raise UserError(
                "distillation learns from a trained network: method.teacher=runs/NAME, a file of weights, a network of "
                "timm, or hf-hub:PERSON/MODEL."
            )
        if loss == "maps" and teacher_sees == "image":
            raise UserError(
                "method.loss=maps compares teacher and student place by place, and with method.teacher_sees=image they "
                "see different places; take method.teacher_sees=view, or method.loss=similarity or cosine."
            )
        net, name = network_called(teacher) if isinstance(teacher, str) else (teacher, type(teacher).__name__)
        self.teacher = FrozenTeacher(net, mean=mean, std=std)
        self.about = f"teacher {name}: {self.teacher.about}"
        self.loss, self.student_temperature, self.teacher_temperature = loss, student_temperature, teacher_temperature
        self.teacher_sees = teacher_sees
        self.table: FeatureTable | None = None
        width: int = backbone.num_features  # type: ignore[assignment]
        D = self.teacher.num_features
        self.head = mlp([width, width, D], linear=pointwise_conv if loss == "maps" else nn.Linear)
        if loss == "similarity":
            self.queue = Queue(queue_length, D, unit=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        if self.loss == "maps":
            asked = [self.of_maps(view) for view in batch.views]
        else:
            t = self.taught(batch)  # [B, D] each, without gradient
            s = [self.head(self.backbone(view)) for view in batch.views]
            asked = [self.of_features(*pair) for pair in zip(s, t, strict=True)]
            if self.loss == "similarity":
                new = t[:1] if self.teacher_sees == "image" else t
                self.collect(embeddings=F.normalize(torch.stack(new, dim=1), dim=2))  # [B, V, D], or [B, 1, D]
        return {"loss": torch.stack(asked).mean()}

    def taught(self, batch: Batch) -> list[Tensor]:
        """The teacher's features ``[B, D]`` for each view, from the table where there is one.

        Raises:
            UserError: it sees images, and nobody has given a table.
        """
        if self.table is not None:
            return [self.table(batch.indices)] * len(batch.views)
        if self.teacher_sees == "image":
            raise UserError(
                "method.teacher_sees=image takes the teacher's features from a table, which `selfsight pretrain` "
                "makes; in a loop of your own call take_features(x, indices) before the first step."
            )
        return [self.teacher(view) for view in batch.views]

    def shown_once(self, *, plain: bool) -> nn.Module | str:
        if self.loss == "maps":
            return "maps are not kept"
        if self.teacher_sees == "image" or plain:
            return self.teacher
        return "they differ from step to step (method.teacher_sees=image: each image once, its features kept)"

    def take_features(self, x: Tensor, indices: Tensor) -> None:
        self.table = FeatureTable(x, indices, next(self.head.parameters()).device)

    def of_features(self, s: Tensor, t: Tensor) -> Tensor:
        """The loss of a view by the pooled features ``[B, D]`` of student and teacher."""
        if self.loss == "cosine":
            return cosine_distance(s, t)
        temperatures = {
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature,
        }
        return similarity_distillation(s, t, self.queue.data, **temperatures)

    def of_maps(self, view: Tensor) -> Tensor:
        """The loss of a view by the last maps of student and teacher, the teacher's in as many places."""
        s, t = self.head(feature_map(self.backbone, view)), self.teacher.forward_map(view)  # [B, D, h, w] each
        return cosine_distance(s, F.adaptive_avg_pool2d(t, s.shape[-2:]))

    def take_in(self, embeddings: Tensor) -> None:
        self.queue.push(embeddings.flatten(0, 1))

    def chance_loss(self) -> float:
        """Every image is as similar to one as to another, or lies at right angles to what was asked."""
        return math.log(1 + len(self.queue)) if self.loss == "similarity" else 1.0
