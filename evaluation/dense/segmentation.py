"""Images with masks, for the dense probes: drawn shapes that need no download, folders, and Pascal VOC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from selfsight.datamodules.datasets.synthetic_shapes import SHAPES, VOID, draw
from selfsight.errors import UserError
from selfsight.evaluation.image_files import read_image
from selfsight.validation import Kind, expect, number, takes, whole

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # image [H, W, 3], mask [H, W]


class Masked(Sequence[Pair]):
    """Numbered images with masks of the same height and width; read when asked for.

    Raises:
        UserError: on reading a pair of different sizes.
    """

    def __init__(self, names: Sequence[str], read: Callable[[int], Pair]) -> None:
        self.names, self._read = names, read

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        image, mask = self._read(index)
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"The mask of {self.names[index]} has {mask.shape[1]} x {mask.shape[0]} pixels and its image "
                f"{image.shape[1]} x {image.shape[0]}: a mask needs one value for every pixel of its image."
            )
        return image, mask


@dataclass(frozen=True)
class SegmentationData:
    """Masks hold class numbers below ``len(classes)``, and `VOID` (255) where nothing is asked."""

    name: str
    train: Masked
    test: Masked
    classes: tuple[str, ...]


FEWEST_AND_MOST = Kind(
    "a list of the fewest and the most shapes of an image, such as [1,3],", lambda v: len(v) == 2 and v[0] <= v[1]
)


@takes(train=whole(0), test=whole(0), size=whole(1), seed=whole(0), number=whole(0))
def shapes(
    train: int = 200, test: int = 100, size: int = 64, seed: int = 0, number: Sequence[int] = (1, 3)
) -> SegmentationData:
    """Drawn images, see `synthetic_shapes.draw`; for other images of them take another seed."""
    expect("number of shapes", number, FEWEST_AND_MOST)
    rng = np.random.default_rng(seed)
    pairs = [draw(size, rng, number) for _ in range(train + test)]

    def part(some: list[Pair], kind: str) -> Masked:
        return Masked([f"{kind} {i}" for i in range(len(some))], some.__getitem__)

    return SegmentationData("shapes", part(pairs[:train], "train"), part(pairs[train:], "test"), SHAPES)


@takes(test_share=number("a share between 0 and 1", lambda v: 0 < v < 1), seed=whole(0))
def folder(root: str, test_share: float = 0.2, seed: int = 0, classes: Sequence[str] | None = None) -> SegmentationData:
    """``root/images`` and ``root/masks`` (or the two inside ``root/train`` and ``root/test``), paired by file name.

    Masks are single-channel or palette files of class numbers, 255 for void. Without the two folders a share of the
    images, drawn by the seed, is held out.

    Args:
        classes: their names; None: as many numbers as the training masks use.
    """
    top = Path(root).expanduser()
    if (top / "train").is_dir():
        train, test = _pairs(top / "train"), _pairs(top / "test")
    else:
        found = _pairs(top)
        order = np.random.default_rng(seed).permutation(len(found))
        held = max(1, round(test_share * len(found)))
        if held >= len(found):
            raise UserError(f"{top} holds {len(found)} images with masks, and both training and testing need some.")
        test, train = ([found[i] for i in sorted(part)] for part in (order[:held], order[held:]))
    if classes is None:
        largest = max(int(mask[mask != VOID].max(initial=0)) for mask in (_mask(path) for _, path in train))
        classes = [str(i) for i in range(largest + 1)]
    parts = [Masked([str(image) for image, _ in pairs], _reader(pairs)) for pairs in (train, test)]
    return SegmentationData(top.name, parts[0], parts[1], tuple(classes))


def voc(root: str, download: bool = False) -> SegmentationData:
    """Pascal VOC 2012 segmentation by torchvision: 1,464 images to train on, 1,449 to test on, 21 classes.

    Raises:
        UserError: when it is not below ``root`` and ``download`` is false.
    """
    from torchvision.datasets import VOCSegmentation

    root = str(Path(root).expanduser())
    try:
        sets = [VOCSegmentation(root, year="2012", image_set=split, download=download) for split in ("train", "val")]
    except RuntimeError:
        raise UserError(
            f"Pascal VOC 2012 is not in {Path(root).absolute()}: set download to true to fetch it."
        ) from None
    parts = []
    for each in sets:
        pairs = list(zip(map(Path, each.images), map(Path, each.masks), strict=True))
        parts.append(Masked([str(image) for image, _ in pairs], _reader(pairs)))
    names = (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    )
    return SegmentationData("voc2012", parts[0], parts[1], tuple(names.split()))


def _pairs(top: Path) -> list[tuple[Path, Path]]:
    images, masks = top / "images", top / "masks"
    for needed in (images, masks):
        if not needed.is_dir():
            raise UserError(
                f"{needed} is missing: images and masks of the same names stand in folders 'images' and 'masks'."
            )
    by_name = {path.stem: path for path in sorted(masks.iterdir()) if path.suffix.lower() in IMAGES}
    found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGES]
    lost = [path.name for path in found if path.stem not in by_name]
    if lost:
        raise UserError(f"{len(lost)} of {len(found)} images in {images} have no mask of their name, {lost[0]} first.")
    if not found:
        raise UserError(f"There are no images in {images}.")
    return [(path, by_name[path.stem]) for path in found]


def _reader(pairs: Sequence[tuple[Path, Path]]) -> Callable[[int], Pair]:
    return lambda index: (read_image(pairs[index][0]), _mask(pairs[index][1]))


def _mask(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except OSError:
        raise UserError(f"'{path}' cannot be read as a mask; repair it, or take it and its image out.") from None
    if mode not in ("P", "L", "1", "I", "I;16"):
        raise UserError(f"{path} has colours ({mode}), and a mask holds one class number for every pixel.")
    if values.max(initial=0) > VOID:
        raise UserError(f"{path} holds the value {values.max()}, and masks go up to 254, with 255 for void.")
    return values.astype(np.uint8)
