"""Detection: torchvision's Faster and Mask R-CNN with a feature pyramid on a pretrained backbone, and COCO's AP."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from selfsight.errors import UserError
from selfsight.optim.groups import decayed_and_plain, layer_decayed

from .features import Device, home, tapped

NORMS, HEADS = ("frozen", "batch"), ("fc", "conv")
CHANNELS = 256  # of every level of the pyramid
#: COCO's twelve figures begin with these: over overlaps of 0.5 to 0.95, at two of them, and by size of the object
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]


class CocoImages(Dataset[Sample | UserError]):
    """The images a COCO annotation file lists: ``[3, H, W]`` floats from 0 to 1, and what torchvision's detectors ask.

    A target has ``boxes [n, 4]`` (x1, y1, x2, y2 in pixels), ``labels [n]`` (1 is the first category by id, 0 the
    background), ``masks [n, H, W]`` where asked for, and ``image_id``. Crowds and boxes without an area are left out.

    Attributes:
        annotations: pycocotools' index of the file. categories: their ids, sorted. classes: their names.

    Raises:
        UserError: pycocotools is not installed, the file is missing or not in COCO's format, an image is missing.
    """

    def __init__(self, images: Path, annotations: Path, *, masks: bool, learn: bool) -> None:
        """``learn``: leave out images without objects, and mirror every second one."""
        self.images, self.masks, self.learn = images, masks, learn
        self.annotations = _index(annotations, masks)
        self.categories = sorted(self.annotations.getCatIds())
        self.classes = [str(one["name"]) for one in self.annotations.loadCats(self.categories)]
        self.ids = sorted(self.annotations.getImgIds())
        if learn:
            self.ids = [i for i in self.ids if self.objects(i)]
        if not self.ids:
            raise UserError(f"'{annotations}' lists no images{' with objects' * learn}.")
        names = [str(self.annotations.loadImgs(i)[0]["file_name"]) for i in self.ids]
        lost = [name for name in names if not (images / name).is_file()]
        if lost:
            raise UserError(
                f"{len(lost)} of the {len(names)} images that '{annotations}' lists are not in '{images}', '{lost[0]}' "
                "for one; dataset.train and dataset.test name the folders."
            )
        self.paths = [images / name for name in names]

    def __len__(self) -> int:
        return len(self.ids)

    def objects(self, image: int) -> list[dict[str, Any]]:
        """Annotations of an image that can be learnt from."""
        found = self.annotations.loadAnns(self.annotations.getAnnIds(imgIds=image, iscrowd=False))
        return [one for one in found if one["bbox"][2] > 0 and one["bbox"][3] > 0]

    def __getitem__(self, index: int) -> Sample | UserError:
        """A mistake in the data is handed over, not raised: a worker process would bury it in a traceback."""
        try:
            return self._read(index)
        except UserError as error:
            return error

    def _read(self, index: int) -> Sample:
        from PIL import Image
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        path, listed = self.paths[index], self.annotations.loadImgs(self.ids[index])[0]
        try:
            with Image.open(path) as file:
                pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        except OSError:
            raise UserError(f"'{path}' cannot be read as an image; take it out of the annotations.") from None
        H, W = pixels.shape[1:]
        if (listed["height"], listed["width"]) != (H, W):
            raise UserError(
                f"'{path}' has {W} x {H} pixels, and its annotations were made for {listed['width']} x "
                f"{listed['height']}: boxes and masks would lie elsewhere; take the images they were made for."
            )
        objects = self.objects(self.ids[index])
        corners = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in objects)]
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(H, W)
            ),
            "labels": torch.tensor([1 + self.categories.index(one["category_id"]) for one in objects]).long(),
            "image_id": torch.tensor(self.ids[index]),
        }
        if self.masks:
            drawn = np.zeros((len(objects), H, W), np.uint8)
            for mask, one in zip(drawn, objects, strict=True):
                mask[:] = self.annotations.annToMask(one)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(drawn))
        image = tv_tensors.Image(pixels)
        if self.learn:
            image, target = v2.RandomHorizontalFlip()(image, target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor).float() / 255, plain


@dataclass(frozen=True)
class DetectionData:
    """Images with boxes (and masks) to learn from and to measure on; both files name the same categories."""

    name: str
    train: CocoImages
    test: CocoImages

    @property
    def classes(self) -> list[str]:
        return self.train.classes


def coco(
    root: str,
    train: str = "train2017",
    test: str = "val2017",
    annotations: str = "annotations/instances_{split}.json",
    masks: bool = False,
) -> DetectionData:
    """A folder in COCO's layout: images in ``root/<train>`` and ``root/<test>``, their annotation files as named.

    Raises:
        UserError: see `CocoImages`; or the two files name different categories.
    """
    top = Path(root).expanduser()
    parts = [
        CocoImages(top / split, top / annotations.replace("{split}", split), masks=masks, learn=split == train)
        for split in (train, test)
    ]
    if parts[0].classes != parts[1].classes:
        raise UserError(
            f"the annotations of '{train}' and '{test}' in '{top}' name different categories; they have to agree."
        )
    return DetectionData(top.name, parts[0], parts[1])


class Pyramid(nn.Module):
    """A backbone's last four stages as a feature pyramid, ``{"0": [B, 256, h, w], ..., "pool"}``, finest first."""

    def __init__(self, backbone: nn.Module, norm: str) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        info: list[dict[str, Any]] = list(getattr(backbone, "feature_info", []))[-4:]
        self.strides = [int(stage["reduction"]) for stage in info]
        if len(info) < 2 or any(b <= a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise UserError(
                f"a feature pyramid needs stages each coarser than the one before, and those of this backbone shrink "
                f"the image {', '.join(map(str, self.strides)) or 'not at all'} times: take a ResNet or ConvNeXt."
            )
        self.names = [str(stage["module"]) for stage in info]
        self.body = backbone
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
            self.body.forward_features(x)  # type: ignore[operator]
        return self.fpn({str(i): caught[name] for i, name in enumerate(self.names)})

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        for module in self.body.modules():  # what is not to learn keeps its statistics, too
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None and not module.weight.requires_grad:
                module.eval()
        return self


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

    for name, value, known in (("norm", norm, NORMS), ("heads", heads, HEADS)):
        if value not in known:
            raise UserError(f"{name} is '{value}'; choose from {', '.join(known)}.")
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

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise UserError(f"iterations={self.iterations} of {self.batch_size} images; both have to be 1 or more.")

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
        groups = decayed_and_plain(net) if self.layer_decay == 1 else layer_decayed(net, self.layer_decay)
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
        yield from _loaded(self.data.train, self.batch_size, order[:wanted].tolist(), num_workers)


def predict(net: nn.Module, images: CocoImages, num_workers: int = 0) -> list[dict[str, Any]]:
    """What a detector finds, as COCO's list of results; masks as run lengths where it makes them."""
    from pycocotools import mask as run_lengths

    net.eval()
    device, found = home(net, None), []
    for batch, targets in _loaded(images, 1, range(len(images)), num_workers):
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


def average_precision(images: CocoImages, found: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """COCO's ``<box|mask>_ap``, ``_ap50``, ``_ap75``, ``_ap_small``, ``_ap_medium``, ``_ap_large``, from 0 to 1.

    Args:
        found: COCO's list of results. kind: ``bbox`` or ``segm``.

    Returns:
        Without those of a size that no object of the images has.
    """
    from pycocotools.cocoeval import COCOeval

    prefix = "box" if kind == "bbox" else "mask"
    if not found:
        return {f"{prefix}_{name}": 0.0 for name in FIGURES[:3]}
    with contextlib.redirect_stdout(io.StringIO()):
        results = images.annotations.loadRes([{k: v for k, v in one.items() if k != _OTHER[kind]} for one in found])
        measure = COCOeval(images.annotations, results, kind)
        measure.params.imgIds = images.ids
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    figures = zip(FIGURES, measure.stats, strict=False)
    return {f"{prefix}_{name}": float(value) for name, value in figures if value >= 0}


#: what a result must not carry: pycocotools takes boxes for masks wherever it finds them
_OTHER = {"bbox": "segmentation", "segm": "bbox"}


def _loaded(
    images: CocoImages, batch_size: int, order: Sequence[int], num_workers: int
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    for batch in DataLoader(images, batch_size, sampler=order, num_workers=num_workers, collate_fn=_side_by_side):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _side_by_side(samples: Sequence[Sample | UserError]) -> tuple[list[Tensor], list[Target]] | UserError:
    """Images differ in size, so that they stay a list. A mistake among them stands for the whole batch."""
    whole = [sample for sample in samples if not isinstance(sample, UserError)]
    if len(whole) < len(samples):
        return next(sample for sample in samples if isinstance(sample, UserError))
    return [image for image, _ in whole], [target for _, target in whole]


def _moved(target: Target, device: torch.device) -> Target:
    return {name: value.to(device) for name, value in target.items()}


def _index(path: Path, masks: bool) -> Any:
    """pycocotools' index of an annotation file, once that is known to be one."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError("detection needs one more package: pip install 'selfsight[detection]'.") from None
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"there is no annotation file '{path}'; dataset.annotations says where it is, with {{split}} for the part."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({str(error)[:100]}); copy or download it again.") from None
    if problem := _problem(content, masks):
        raise UserError(f"'{path}' is not in COCO's format: {problem}.")
    index = COCO()
    index.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def _problem(content: Any, masks: bool) -> str | None:
    """What is wrong with the content of an annotation file."""
    needed: Mapping[str, tuple[str, ...]] = {
        "images": ("id", "file_name", "height", "width"),
        "categories": ("id", "name"),
        "annotations": ("id", "image_id", "category_id", "bbox", *(("segmentation",) if masks else ())),
    }
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            return f"it has no list '{part}'"
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or (lacking := [key for key in keys if key not in row]):
                return f"entry {i} of '{part}' has no '{lacking[0] if isinstance(row, dict) else keys[0]}'"
    images = {one["id"] for one in content["images"]}
    categories = {one["id"] for one in content["categories"]}
    for one in content["annotations"]:
        who = f"annotation {one['id']}"
        if one["image_id"] not in images:
            return f"{who} is of image {one['image_id']}, which 'images' does not list"
        if one["category_id"] not in categories:
            return f"{who} is of category {one['category_id']}, which 'categories' does not list"
        box = one["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            return f"the bbox of {who} is {box}, and four numbers were expected: x, y, width, height"
        one.setdefault("iscrowd", 0)
        one.setdefault("area", box[2] * box[3])
    return None
