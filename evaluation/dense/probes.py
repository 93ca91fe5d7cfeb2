"""What frozen feature maps know of each place in an image: segmentation by a linear layer and by neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.datamodules.datasets.synthetic_shapes import VOID
from selfsight.errors import UserError
from selfsight.evaluation.dense.dilation import dilated
from selfsight.evaluation.dense.segmentation import Masked, SegmentationData
from selfsight.evaluation.features import FINAL, Device, home, staged
from selfsight.evaluation.probes.knn import neighbours
from selfsight.nn.sphere import directions
from selfsight.validation import above, takes, whole

LABEL_SIDE = 100  # masks in training, as Leopart's linear probe has them
HELD_OUT = 0.1


@dataclass(frozen=True)
class Maps:
    """Feature maps ``[N, D, h, w]`` float32, and each image's mask in its own size."""

    x: Tensor
    masks: Sequence[Tensor]  # [H_i, W_i] uint8

    def __len__(self) -> int:
        return len(self.x)


@takes(
    size=whole(1), dilate=whole(0), learning_rates=above(0), epochs=whole(1), batch_size=whole(1), seed=whole(0)
)  # fmt: skip
@dataclass(frozen=True)
class DenseLinear:
    """A 1x1 convolution on standardised frozen maps, upsampled bilinearly to the masks.

    After Leopart's protocol (Ziegler & Asano 2022), on cached maps of un-augmented images: SGD with momentum 0.9 and
    decay 1e-4 for 25 epochs, a tenth of the rate after 20, batches of 64, masks of at most 100 x 100 pixels in
    training. All rates are trained at once, and the best on a tenth of the training images is trained again on all of
    them. Measured at the masks' own size.

    Attributes:
        data: what to segment. size: side of the square the images are resized to. stage: whose map.
        dilate: number of last stages that keep their resolution instead of halving it, 2 for a stride of 8.
    """

    data: SegmentationData
    size: int
    stage: str = FINAL
    dilate: int = 0
    learning_rates: Sequence[float] = (0.01, 0.1, 1.0)
    epochs: int = 25
    batch_size: int = 64
    seed: int = 0
    needs_labels = False

    @property
    def protocol(self) -> str:
        return (
            f"linear segmentation of {self.data.name}: 1x1 convolution on frozen maps, input {self.size} px, "
            f"{_strides(self.dilate)}, rate chosen on a tenth of the training images, mIoU over all test pixels at "
            "the masks' own size"
        )

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, Any]:
        """``dense_linear_miou``, ``dense_linear_iou`` by class, ``dense_linear_rate``."""
        train, test = maps(dilated(backbone, self.dilate), self.data, self.size, datamodule, self.stage, device)
        scores, rate = self.fit(train, test, len(self.data.classes))
        return intersection_over_union("dense_linear", scores, test, self.data.classes) | {"dense_linear_rate": rate}

    def fit(self, train: Maps, test: Maps, classes: int) -> tuple[Tensor, float]:
        """Scores ``[N, C, h, w]`` of the test maps, and the rate chosen."""
        mean, std = train.x.mean(dim=(0, 2, 3), keepdim=True), train.x.std(dim=(0, 2, 3), keepdim=True)
        x, other = ((part.x - mean) / std.clamp(min=1e-6) for part in (train, test))
        labels = _resized(train.masks, min(self.size, LABEL_SIDE))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        held, fitting = order.tensor_split([max(1, round(HELD_OUT * len(x)))])
        rates = [float(rate) for rate in self.learning_rates]
        if len(rates) > 1 and len(fitting):
            heads = self._train(x[fitting], labels[fitting], classes, rates)
            found = [miou(_scores(x[held], head), list(labels[held]), classes) for head in heads]
            rates = [rates[max(range(len(rates)), key=found.__getitem__)]]
        (head,) = self._train(x, labels, classes, rates[:1])
        return _scores(other, head), rates[0]

    def _train(self, x: Tensor, labels: Tensor, classes: int, rates: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Weight ``[C, D]`` and bias ``[C]`` for each rate; all rates see the same batches."""
        heads = [(x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)) for _ in rates]
        groups = [
            {"params": [p.requires_grad_() for p in head], "lr": lr} for head, lr in zip(heads, rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.8 * self.epochs)])
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
                targets = labels[rows].long()
                optimizer.zero_grad()
                for head in heads:
                    upsampled = F.interpolate(_scores(x[rows], head), targets.shape[1:], mode="bilinear")
                    F.cross_entropy(upsampled, targets, ignore_index=VOID).backward()
                optimizer.step()
            drop.step()
        return [(weight.detach(), bias.detach()) for weight, bias in heads]


@takes(size=whole(1), dilate=whole(0), k=whole(1), temperature=above(0), memory=whole(1), seed=whole(0))
@dataclass(frozen=True)
class DenseKNN:
    """Each cell of a test map takes the mean label of its nearest cells among the training maps; nothing is trained.

    After Balazevic et al. 2023, *Towards In-Context Scene Understanding*: unit features, a cell's label is the share of
    each class in its pixels, 30 neighbours weighted by softmax(cosine / 0.02), scores upsampled bilinearly.
    Here void pixels count for nothing, and cells of void pixels alone are left out.

    Attributes:
        data, size, stage, dilate: as for `DenseLinear`.
        memory: most cells kept. Beyond that each image gives the same number, those with rare classes first.
    """

    data: SegmentationData
    size: int
    stage: str = FINAL
    dilate: int = 0
    k: int = 30
    temperature: float = 0.02
    memory: int = 100_000
    seed: int = 0
    needs_labels = False

    @property
    def protocol(self) -> str:
        return (
            f"nearest-neighbour segmentation of {self.data.name}: {self.k} cells, softmax(cosine / "
            f"{self.temperature:g}), at most {self.memory} training cells, input {self.size} px, "
            f"{_strides(self.dilate)}, mIoU over all test pixels at the masks' own size"
        )

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, Any]:
        """``dense_knn_miou`` and ``dense_knn_iou`` by class."""
        train, test = maps(dilated(backbone, self.dilate), self.data, self.size, datamodule, self.stage, device)
        scores = self.fit(train, test, len(self.data.classes))
        return intersection_over_union("dense_knn", scores, test, self.data.classes)

    def fit(self, train: Maps, test: Maps, classes: int) -> Tensor:
        """Scores ``[N, C, h, w]`` of the test maps."""
        h, w = train.x.shape[2:]
        soft = torch.stack([cell_labels(mask, classes, h, w) for mask in train.masks])  # [N, C, h, w]
        soft = soft.flatten(2).transpose(1, 2)  # [N, cells, C]
        kept = self._kept(soft)
        bank = directions(_cells(train.x)[kept])
        labels = soft.flatten(0, 1)[kept]
        k = min(self.k, len(bank))
        similarity, index = neighbours(directions(_cells(test.x)), bank, k)
        weight = (similarity / self.temperature).softmax(dim=1)
        votes = torch.zeros(len(weight), classes)
        for place in range(k):  # one neighbour at a time: [cells, k, C] at once would be large
            votes += weight[:, place, None] * labels[index[:, place]]
        return votes.view(len(test), *test.x.shape[2:], classes).permute(0, 3, 1, 2)

    def _kept(self, soft: Tensor) -> Tensor:
        """Rows of the cells that go into the memory, out of labels ``[N, cells, C]``."""
        usable = soft.sum(dim=2) > 0  # [N, cells]
        each = max(1, self.memory // len(soft))
        if int(usable.sum()) > self.memory:
            frequency = soft.sum(dim=1, keepdim=True) / usable.sum(dim=1)[:, None, None].clamp(min=1)  # [N, 1, C]
            generator = torch.Generator().manual_seed(self.seed)
            commonness = (frequency * (soft > 0)).sum(dim=2) * torch.rand(soft.shape[:2], generator=generator)
            rank = commonness.masked_fill(~usable, torch.inf).argsort(dim=1).argsort(dim=1)
            usable &= rank < each
        return usable.flatten().nonzero()[:, 0]


def maps(
    backbone: nn.Module,
    data: SegmentationData,
    size: int,
    normalised_like: Any,
    stage: str = FINAL,
    device: Device = None,
) -> tuple[Maps, Maps]:
    """Feature maps of training and test images, resized to a square (antialiased), normalised as a datamodule does.

    Args:
        normalised_like: has ``views`` whose first gives ``mean`` and ``std``.
        stage: ``final`` (the last map), or a module name out of ``feature_info``.
    """
    for name, part in (("learn from", data.train), ("measure on", data.test)):
        if not len(part):
            raise UserError(f"The images with masks '{data.name}' hold none to {name}: a dense probe takes both.")
    device = home(backbone, device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in _statistics(normalised_like))
    found = []
    with staged(backbone, [stage], maps=True) as outputs:
        for part in (data.train, data.test):
            kept, masks = [], []
            for start in range(0, len(part), 32):
                pairs = part[start : start + 32]
                images = torch.stack([_square(image, size) for image, _ in pairs]).to(device)
                kept.append(outputs((images / 255 - mean) / std)[stage].float().cpu())
                masks += [torch.from_numpy(mask) for _, mask in pairs]
            _check_masks(masks, part, data.classes)
            found.append(Maps(torch.cat(kept), masks))
    return found[0], found[1]


def cell_labels(mask: Tensor, classes: int, h: int, w: int) -> Tensor:
    """Share of each class in a cell's pixels that are not void: ``[H, W]`` -> ``[C, h, w]``, 0 where all are."""
    valid = mask != VOID
    one_hot = F.one_hot(mask.long().where(valid, 0), classes).permute(2, 0, 1).float() * valid
    shares = F.adaptive_avg_pool2d(one_hot, (h, w))
    return shares / shares.sum(dim=0, keepdim=True).clamp(min=1e-12)


def miou(scores: Tensor, masks: Sequence[Tensor], classes: int) -> float:
    """Mean over classes of intersection over union, from one confusion matrix over all pixels that are not void.

    Scores ``[N, C, h, w]`` are upsampled bilinearly to each mask. A class neither predicted nor present is left out.
    """
    return float(_jaccard(scores, masks, classes)["mean"])


def intersection_over_union(name: str, scores: Tensor, test: Maps, classes: Sequence[str]) -> dict[str, Any]:
    """``<name>_miou`` and ``<name>_iou`` by class."""
    found = _jaccard(scores, test.masks, len(classes))
    by_class = {label: float(value) for label, value in zip(classes, found["each"], strict=True)}
    return {f"{name}_miou": float(found["mean"]), f"{name}_iou": by_class}


def _jaccard(scores: Tensor, masks: Sequence[Tensor], classes: int) -> dict[str, Tensor]:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassJaccardIndex

    mean = MulticlassJaccardIndex(classes, ignore_index=VOID, average="macro")
    each = MulticlassJaccardIndex(classes, ignore_index=VOID, average="none")
    metric = MetricCollection({"mean": mean, "each": each})
    for score, mask in zip(scores, masks, strict=True):
        upsampled = F.interpolate(score[None], mask.shape, mode="bilinear")
        metric.update(upsampled.argmax(dim=1), mask[None].long())
    return metric.compute()


def _strides(dilate: int) -> str:
    return f"last {dilate} strides dilated" if dilate else "strides as trained"


def _statistics(like: Any) -> tuple[Sequence[float], Sequence[float]]:
    view = like.views[0]
    return (view.mean, view.std) if view.mean is not None else ((0.0,) * 3, (1.0,) * 3)


def _square(image: Any, size: int) -> Tensor:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]


def _resized(masks: Sequence[Tensor], side: int) -> Tensor:
    """Masks ``[N, side, side]`` by nearest neighbour."""
    return torch.cat([F.interpolate(m[None, None].float(), (side, side), mode="nearest-exact")[0] for m in masks]).to(
        torch.uint8
    )


def _scores(x: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = head
    return F.conv2d(x, weight[:, :, None, None], bias)


def _cells(x: Tensor) -> Tensor:
    """``[N, D, h, w]`` -> ``[N h w, D]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _check_masks(masks: Sequence[Tensor], part: Masked, classes: Sequence[str]) -> None:
    for name, mask in zip(part.names, masks, strict=True):
        largest = int(mask[mask != VOID].max()) if bool((mask != VOID).any()) else 0
        if largest >= len(classes):
            raise UserError(
                f"The mask of {name} holds class {largest}, and the {len(classes)} classes go from 0 to "
                f"{len(classes) - 1}."
            )
