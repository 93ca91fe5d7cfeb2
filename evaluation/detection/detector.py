"""Detection: torchvision's Faster and Mask R-CNN with a feature pyramid on a pretrained backbone, and COCO's AP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.backbones.interface import stages_of, to_map
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.evaluation.detection.coco import CocoImages, DetectionData, Target, average_precision, loaded
from selfsight.evaluation.features import Device, home, tapped
from selfsight.optim.groups import layer_decayed, split_no_decay
from selfsight.validation import SWITCH, above, at_least, one_of, takes, whole

NORMS, HEADS = ("frozen", "batch"), ("fc", "conv")
CHANNELS = 256  # of every level of the pyramid


class Pyramid(nn.Module):
    """A backbone's last four stages as a feature pyramid, ``{"0": [B, 256, h, w], ..., "pool"}``, finest first."""

    def __init__(self, backbone: nn.Module, norm: str) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        info = list(stages_of(backbone).values())[-4:]
        self.strides = [int(stage["reduction"]) for stage in info]
        if len(info) < 2 or any(b <= a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise UserError(
                f"a feature pyramid needs stages each coarser than the one before, and those of this backbone shrink "
                f"the image {', '.join(map(str, self.strides)) or 'not at all'} times: take a ResNet or ConvNeXt."
            )
        self.names = [str(stage["module"]) for stage in info]
        self.body = cast(Backbone, backbone)
        self.out_channels = CHANNELS
        self.levels = [*map(str, range(len(info))), "pool"]
        self.fpn = FeaturePyramidNetwork(
            [int(stage["num_chs"]) for stage in info],
            CHANNELS,
            LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d if norm == "batch" else None,
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with tapped(self.body, self.names) as caught:
            self.body.forward_features(x)
        maps = {str(i): to_map(self.body, caught[name], x.shape[-2:], name) for i, name in enumerate(self.names)}
        return self.fpn(maps)

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        for module in self.body.modules():  # what is not to learn keeps its statistics, too
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None and not module.weight.requires_grad:
                module.eval()
        return self


@takes(norm=one_of(*NORMS), heads=one_of(*HEADS), short_side=whole(1), long_side=whole(1))
def detector(
    backbone: nn.Module,
    classes: int,
    *,
    masks: bool,
    norm: str = "frozen",
    heads: str = "fc",
    short_side: Sequence[int] = (800,),
    long_side: int = 1333,
    boxes: int = 512,
    proposals: int = 1000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Faster R-CNN, or Mask R-CNN with ``masks``, whose body is ``backbone`` itself.

    Args:
        classes: kinds of objects, without the background.
        norm: ``frozen`` keeps the backbone's BatchNorm as pretrained; ``batch`` lets it learn and puts BatchNorm into
            the pyramid and the heads.
        heads: of the boxes: ``fc`` two layers; ``conv`` four convolutions and a layer (Wu & He 2018).
        short_side: pixels; one of them is drawn for each image in training, the last is for testing.
        boxes: for each image, that the heads learn from. proposals: for each image, that they look at.
        mean, std: what the backbone was trained with; None: images from 0 to 1 as they are.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.ops import MultiScaleRoIAlign

    backbone.requires_grad_(True)
    if norm == "frozen":
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    body = Pyramid(backbone, norm)
    strides = [*body.strides, 2 * body.strides[-1]]
    shapes = ((0.5, 1.0, 2.0),) * len(strides)
    # FPN (Lin et al. 2017) has anchors of 32 pixels at a stride of 4 and looks at boxes of 224 pixels at 16.
    first = body.strides[0]
    scale = {"canonical_scale": 56 * first, "canonical_level": round(math.log2(4 * first))}
    levels = body.levels[:-1]
    normalise = nn.BatchNorm2d if norm == "batch" else None
    options: dict[str, Any] = {
        "min_size": tuple(short_side),
        "max_size": long_side,
        "box_batch_size_per_image": boxes,
        "rpn_post_nms_top_n_train": proposals,
        "rpn_post_nms_top_n_test": proposals,
        "image_mean": list(mean if mean is not None else (0.0,) * 3),
        "image_std": list(std if std is not None else (1.0,) * 3),
        "rpn_anchor_generator": AnchorGenerator(tuple((8 * stride,) for stride in strides), shapes),
        "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2, **scale),
    }
    if heads == "conv":
        options["box_head"] = FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [1024], norm_layer=normalise)
    if not masks:
        return FasterRCNN(body, classes + 1, **options)
    options["mask_roi_pool"] = MultiScaleRoIAlign(levels, 14, 2, **scale)
    options["mask_head"] = MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1, norm_layer=normalise)
    return MaskRCNN(body, classes + 1, **options)


@takes(
    masks=SWITCH, iterations=whole(1), batch_size=whole(1), warmup=whole(0), drops=whole(1, empty=True),
    gamma=at_least(0), layer_decay=above(0), norm=one_of(*NORMS), heads=one_of(*HEADS), short_side=whole(1),
    long_side=whole(1), boxes=whole(1), proposals=whole(1), seed=whole(0),
)  # fmt: skip
@dataclass(frozen=True)
class Detection:
    """A detector fine-tuned as a whole, measured once, after the last step.

    Attributes:
        optimizer: parameters to optimiser; its ``lr`` is for ``batch_size`` images. Biases and normalisation take no
            weight decay.
        iterations: optimiser steps. warmup: of them, from a thousandth of the rate. drops: those after which the rate
            falls by ``gamma``.
        layer_decay: below 1 every layer of the backbone learns more slowly than the one above it, by this factor.
        norm, heads, short_side, long_side, boxes, proposals: see `detector`.
    """

    data: DetectionData
    optimizer: Callable[..., torch.optim.Optimizer]
    masks: bool
    iterations: int
    batch_size: int
    warmup: int
    drops: Sequence[int]
    gamma: float
    layer_decay: float
    norm: str
    heads: str
    short_side: Sequence[int]
    long_side: int
    boxes: int
    proposals: int
    seed: int

    @property
    def protocol(self) -> str:
        options = getattr(self.optimizer, "keywords", {})
        name = getattr(getattr(self.optimizer, "func", self.optimizer), "__name__", "optimiser")
        norm = "frozen" if self.norm == "frozen" else f"learning over {self.batch_size} images"
        layers = "" if self.layer_decay == 1 else f", layer decay {self.layer_decay:g}"
        sides = f"{min(self.short_side)} to {max(self.short_side)}" if len(self.short_side) > 1 else self.short_side[0]
        return (
            f"{'Mask' if self.masks else 'Faster'} R-CNN with FPN (torchvision, {self.heads} box head), all layers "
            f"fine-tuned on {len(self.data.train):,} images, BatchNorm {norm}: {self.iterations:,} steps of "
            f"{self.batch_size}, {name} rate {options.get('lr', 'as it is')}{layers}, warm-up {self.warmup}, "
            f"x{self.gamma:g} after {' and '.join(map(str, self.drops)) or 'no step'}, flip, short side {sides}; COCO "
            f"AP on {len(self.data.test):,} images at short side {self.short_side[-1]}, after the last step"
        )

    def __call__(
        self,
        backbone: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        device: Device = None,
        num_workers: int = 0,
        watch: Callable[[int, float], None] = lambda step, loss: None,
    ) -> tuple[dict[str, float], nn.Module]:
        """``box_ap``, ``box_ap50``, ... (and ``mask_ap``, ...), and the detector. ``backbone`` itself is trained.

        Args:
            watch: called after every step with its number, from 1, and the loss.

        Raises:
            UserError: the loss is no number.
        """
        torch.manual_seed(self.seed)
        net = detector(
            backbone, len(self.data.classes), masks=self.masks, norm=self.norm, heads=self.heads,
            short_side=self.short_side, long_side=self.long_side, boxes=self.boxes, proposals=self.proposals,
            mean=mean, std=std,
        ).to(home(backbone, device))  # fmt: skip
        self.fit(net, num_workers, watch)
        found = predict(net, self.data.test, num_workers)
        figures = average_precision(self.data.test, found, "bbox")
        if self.masks:
            figures |= average_precision(self.data.test, found, "segm")
        return figures, net

    def fit(self, net: nn.Module, num_workers: int, watch: Callable[[int, float], None]) -> None:
        """All steps, in place."""
        optimizer, schedule = self.optimisation(net)
        net.train()
        device = home(net, None)
        for step, (images, targets) in enumerate(self.batches(num_workers), start=1):
            losses = net([image.to(device) for image in images], [_moved(target, device) for target in targets])
            loss = torch.stack(list(losses.values())).sum()
            if not bool(loss.isfinite()):
                raise UserError(
                    f"the loss is no number at step {step}: lower optimizer.lr, or warm up for longer than "
                    f"detection.warmup={self.warmup} steps."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watch(step, float(loss.detach()))

    def optimisation(self, net: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """Optimiser and schedule of a detector; with ``layer_decay`` lower layers begin with lower rates."""
        groups = split_no_decay(net) if self.layer_decay == 1 else layer_decayed(net, self.layer_decay)
        scales = [group.pop("lr_scale", 1.0) for group in groups]
        optimizer = self.optimizer([{k: v for k, v in group.items() if k != "plain"} for group in groups])
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] *= scale
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)

    def rate(self, step: int) -> float:
        """Multiple of the learning rate in the step after ``step`` steps."""
        ramp = min(1.0, 1e-3 + (1 - 1e-3) * step / self.warmup) if self.warmup else 1.0
        return ramp * self.gamma ** sum(step >= drop for drop in self.drops)

    def batches(self, num_workers: int) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """``iterations`` batches; every image once before any comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        wanted = self.iterations * self.batch_size
        rounds = math.ceil(wanted / len(self.data.train))
        order = torch.cat([torch.randperm(len(self.data.train), generator=generator) for _ in range(rounds)])
        yield from loaded(self.data.train, self.batch_size, order[:wanted].tolist(), num_workers)


def predict(net: nn.Module, images: CocoImages, num_workers: int = 0) -> list[dict[str, Any]]:
    """What a detector finds, as COCO's list of results; masks as run lengths where it makes them."""
    from pycocotools import mask as run_lengths

    net.eval()
    device, found = home(net, None), []
    for batch, targets in loaded(images, 1, range(len(images)), num_workers):
        with torch.no_grad():
            answer = net([image.to(device) for image in batch])[0]
        x1, y1, x2, y2 = answer["boxes"].cpu().unbind(1)
        boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1)
        each = zip(boxes.tolist(), answer["labels"].tolist(), answer["scores"].tolist(), strict=True)
        image = int(targets[0]["image_id"])
        results = [
            {"image_id": image, "category_id": images.categories[label - 1], "bbox": box, "score": score}
            for box, label, score in each
        ]
        for one, mask in zip(results, answer["masks"][:, 0].cpu() if "masks" in answer else (), strict=False):
            one["segmentation"] = run_lengths.encode(np.asfortranarray((mask > 0.5).numpy(), np.uint8))
        found += results
    return found


def _moved(target: Target, device: torch.device) -> Target:
    return {name: value.to(device) for name, value in target.items()}
