"""What the semi-supervised methods share: a classifier and its averaged teacher.

A semi-supervised method learns from a `SemiBatch`: labelled images in one weak view, ``M`` unlabelled ones in a weak
view and one or more strong ones. Its pseudo-labels come from the weak view, its predictions from the strong ones.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import Batch, SemiBatch
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.methods.semi.debiasing import DEBIASED, Debiasing
from selfsight.nn.distributed import exchange, world_size
from selfsight.nn.ema import EMATeacher
from selfsight.nn.heads import mlp
from selfsight.nn.matryoshka import PrefixLayerNorm, PrefixLinear
from selfsight.nn.precision import float32


class Heads(nn.Module):
    """Classifier and projection head on one pooled feature.

    ``h = LayerNorm(f)`` where ``norm_feat`` (else ``h = f``), ``logits = fc(h)``, ``z = normalise(head(h))``.

    Args:
        features: width of the pooled feature. dim: D, width of the embedding.
    """

    def __init__(self, features: int, num_classes: int, dim: int, *, norm_feat: bool = False) -> None:
        super().__init__()
        self.norm = PrefixLayerNorm(features) if norm_feat else nn.Identity()
        self.fc = PrefixLinear(features, num_classes)
        self.head = mlp([features, features, dim], of_features=True)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, features]`` to logits ``[B, C]`` and unit-norm embeddings ``[B, D]``."""
        h = self.norm(f)
        return self.fc(h), F.normalize(float32(self.head(h)), dim=1)


class Classifier(PrefixLinear):
    """The head of methods without embeddings: logits ``[B, C]``, in a tuple as `Heads` has them."""

    def forward(self, f: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(f),)


class Scores(nn.Module):
    """The class scores ``[B, C]`` of a network of `SemiMethod`, which may give embeddings beside them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)[0]
        return scores


class SemiMethod(Method):
    """A method with a classifier that learns from labelled and unlabelled images, and with a teacher that averages it.

    The schedule ``teacher_momentum`` says how slowly the teacher follows.

    Args:
        backbone: network to be trained.
        heads: `Classifier` or `Heads`.
        labels: ``[N_l]`` int64, class of each labelled image; row = its index in the labelled set.
        num_classes: C.
        teacher_buffers: what the teacher does with BatchNorm statistics, see `EMATeacher`. ``copy`` is the model that
            USB evaluates.
        decay: weight decay on ``all`` parameters, or on ``kernels``, which spares biases and normalisation.
        debias: lambda of `Debiasing`; 0 leaves it out. debias_m: momentum of its running mean.

    Raises:
        UserError: no labels, or some that are no classes.
    """

    needs: tuple[str, ...] = ("labels", "num_classes")
    few_labels = True
    schedules = ("teacher_momentum",)

    def __init__(
        self,
        backbone: nn.Module,
        heads: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        teacher_buffers: Literal["copy", "ema", "keep"] = "copy",
        decay: Literal["all", "kernels"] = "kernels",
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        super().__init__(backbone)
        self.decay = decay
        self.debiasing = Debiasing(num_classes, debias, debias_m) if debias else None
        if self.debiasing is not None:
            self.across_images = "; ".join(filter(None, (self.across_images, DEBIASED)))
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise UserError(
                f"{len(labels)} labels were given for {num_classes} classes, not all of them between 0 and "
                f"{num_classes - 1}; give the class of every labelled image."
            )
        self.heads = heads
        self.num_classes, self.num_labelled = num_classes, len(labels)
        self.teacher = EMATeacher(self.student, buffers=teacher_buffers)

    @property
    def student(self) -> nn.Sequential:
        """Backbone and heads as one network."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, heads=self.heads))

    @property
    def measured(self) -> nn.Module:
        """The average's backbone: published figures are of the average."""
        return self.teacher.get_submodule("module.backbone")

    def classifiers(self) -> dict[str, nn.Module]:
        return {"student": Scores(self.student), "teacher": Scores(self.teacher)}

    def logits(self, images: Tensor, teacher: bool = False) -> Tensor:
        """``[B, C]`` class scores by the student, or by its average. Call ``eval()`` first to measure."""
        return (self.teacher if teacher else self.student)(images)[0]

    def after_step(self) -> None:
        self.teacher.update(self.student, self.scheduled["teacher_momentum"])

    def debiased(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of weak and strong views ``[M, C]``, as `Debiasing` has them where that is asked for."""
        return (weak, strong) if self.debiasing is None else self.debiasing(weak, strong)

    def views(self, batch: SemiBatch) -> tuple[Tensor, ...]:
        """Labelled view and unlabelled views, weak first.

        Raises:
            UserError: another number of unlabelled views than the method needs.
        """
        unlabelled, (fewest, most) = batch.unlabelled.views, self.n_views
        if len(unlabelled) < fewest or (most is not None and len(unlabelled) > most):
            needed = f"{fewest}" if most == fewest else f"{fewest} or more"
            raise UserError(
                f"{type(self).__name__} got {len(unlabelled)} views of each unlabelled image and needs {needed}; "
                "set the count of the entries weak and strong in views."
            )
        return batch.labelled.views[0], *unlabelled

    def student_forward(self, *views: Tensor) -> list[tuple[Tensor, ...]]:
        """One forward of the student on all views as one batch; its outputs in float32, view by view.

        BatchNorm sees labelled, weak and strong images together, as in the authors' code.

        Raises:
            UserError: views of different sizes.
        """
        return self._by_view(self.student(self._one_batch(views)), views)

    @torch.no_grad()
    def teacher_forward(self, *views: Tensor) -> list[tuple[Tensor, ...]]:
        """`student_forward` for the teacher. One in train mode sees the batch shuffled over processes.

        The order follows from the step, so that all processes and a resumed run draw the same.
        """
        images = self._one_batch(views)
        if world_size() == 1 or not self.teacher.module.training:
            return self._by_view(self.teacher(images), views)
        generator = torch.Generator().manual_seed(self.step)
        order = torch.randperm(world_size() * len(images), generator=generator).to(images.device, non_blocking=True)
        outputs = self.teacher(exchange(images, order))
        return self._by_view(tuple(exchange(output, order.argsort()) for output in outputs), views)

    def _one_batch(self, views: tuple[Tensor, ...]) -> Tensor:
        sizes = {tuple(view.shape[1:]) for view in views}
        if len(sizes) > 1:
            raise UserError(
                f"{type(self).__name__} puts labelled, weak and strong views into one batch, but got the sizes "
                f"{sorted(sizes)}; give them one size in views."
            )
        return torch.cat(views)

    @staticmethod
    def _by_view(outputs: tuple[Tensor, ...], views: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        parts = [float32(output).split([len(view) for view in views]) for output in outputs]
        return list(zip(*parts, strict=True))

    def monitors(self, mask: Tensor, pseudo_labels: Tensor, unlabelled: Batch) -> dict[str, Tensor]:
        """Share of unlabelled images the threshold lets through and, where their labels are known, how many are right.

        Args:
            mask: ``[M]`` in {0, 1}.
            pseudo_labels: ``[M, C]``.
            unlabelled: the batch they are for.
        """
        found = {"mask_rate": mask.mean()}
        if unlabelled.labels is not None:
            known = mask * (unlabelled.labels >= 0)
            right = pseudo_labels.argmax(-1) == unlabelled.labels
            found["pseudo_label_accuracy"] = (known * right).sum() / known.sum().clamp(min=1)
        return found


def write_rows(bank: Tensor, index: Tensor, rows: Tensor, chosen: Tensor | None = None) -> None:
    """``bank[index] = rows`` in place, for the ``chosen`` rows; of rows for one place the last stays, on every device.

    A set smaller than the global batch brings the same image several times in a step.
    """
    same = index[:, None] == index[None, :]
    if chosen is not None:
        same &= chosen
    last = (same * torch.arange(1, len(index) + 1, device=index.device)).argmax(1)
    found = same.any(1).view(-1, *[1] * (rows.ndim - 1))
    bank[index] = torch.where(found, rows[last].to(bank.dtype), bank[index])
