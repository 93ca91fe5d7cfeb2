"""Images with masks, for the dense probes: drawn shapes that need no download, folders, and Pascal VOC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from selfsight.errors import UserError

VOID = 255
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
SHAPES = ("background", "disc", "square", "triangle", "ring")

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


def shapes(train: int = 200, test: int = 100, size: int = 64, seed: int = 0) -> SegmentationData:
    """Drawn images: one to three shapes, each class with stripes of its own, on a noisy ground; void at the borders.

    Colours are random, so that texture and form have to tell the classes apart.
    """
    rng = np.random.default_rng(seed)
    pairs = [_draw(size, rng) for _ in range(train + test)]

    def part(some: list[Pair], kind: str) -> Masked:
        return Masked([f"{kind} {i}" for i in range(len(some))], some.__getitem__)

    return SegmentationData("shapes", part(pairs[:train], "train"), part(pairs[train:], "test"), SHAPES)


def folder(root: str, test_share: float = 0.2, seed: int = 0, classes: Sequence[str] | None = None) -> SegmentationData:
    """``root/images`` and ``root/masks`` (or the two inside ``root/train`` and ``root/test``), paired by file name.

    Masks are single-channel or palette files of class numbers, 255 for void. Without the two folders a share of the
    images, drawn by the seed, is held out.

    Args:
        classes: their names; None: as many numbers as the training masks use.
    """
    top = Path(root)
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
    return lambda index: (_image(pairs[index][0]), _mask(pairs[index][1]))


def _image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _mask(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1", "I", "I;16"):
            raise UserError(f"{path} has colours ({image.mode}), and a mask holds one class number for every pixel.")
        values = np.asarray(image)
    if values.max(initial=0) > VOID:
        raise UserError(f"{path} holds the value {values.max()}, and masks go up to 254, with 255 for void.")
    return values.astype(np.uint8)


def _draw(size: int, rng: np.random.Generator) -> Pair:
    y, x = np.mgrid[:size, :size].astype(np.float64)
    image = rng.uniform(60, 190, 3) + rng.normal(0, 18, (size, size, 1))
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(1, 4)):
        kind = int(rng.integers(1, len(SHAPES)))
        radius = size * rng.uniform(0.15, 0.26)
        cx, cy = rng.uniform(radius, size - radius, 2)
        distance = _distance(SHAPES[kind], x - cx, y - cy, radius)  # below 0 inside, in pixels
        across = (x, y, x + y, x - y)[kind - 1]
        stripes = np.sin(across * 2 * np.pi / (4 + kind) + rng.uniform(0, 2 * np.pi))
        colour = rng.uniform(60, 190, 3) + 45 * stripes[..., None] + rng.normal(0, 8, (size, size, 1))
        inside = distance < 0
        image[inside] = colour[inside]
        mask[inside] = kind
        mask[np.abs(distance) < 0.75] = VOID
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _distance(kind: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """About the distance in pixels to the border of a shape around the origin, negative inside."""
    if kind == "disc":
        return np.hypot(x, y) - radius
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if kind == "triangle":
        return np.maximum(y - 0.6 * radius, np.abs(x) * 0.866 - y * 0.5 - 0.5 * radius)
    return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
