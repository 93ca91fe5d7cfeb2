"""Images with boxes and masks in COCO's format, and COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsight.errors import UserError
from selfsight.evaluation.image_files import read_image

#: COCO's twelve figures begin with these: over overlaps of 0.5 to 0.95, at two of them, and by size of the object
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
#: what a result must not carry: pycocotools takes boxes for masks wherever it finds them
_OTHER = {"bbox": "segmentation", "segm": "bbox"}

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
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        path, listed = self.paths[index], self.annotations.loadImgs(self.ids[index])[0]
        pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1)
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
        CocoImages(top / split, top / annotations.replace("{split}", split), masks=masks, learn=learn)
        for split, learn in ((train, True), (test, False))
    ]
    if parts[0].classes != parts[1].classes:
        raise UserError(
            f"the annotations of '{train}' and '{test}' in '{top}' name different categories; they have to agree."
        )
    return DetectionData(top.name, parts[0], parts[1])


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


def loaded(
    images: CocoImages, batch_size: int, order: Sequence[int], num_workers: int
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Batches of images and targets in the given order; a mistake in the data is raised here."""
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
