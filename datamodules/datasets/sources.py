"""Data sets with a name: one function each, which gives an `ImageData`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.datasets import checks
from selfsight.datamodules.datasets.dataset import ImageData, keep_in_memory
from selfsight.datamodules.datasets.downloads import arrays_only, damaged, idx_file, obtain
from selfsight.datamodules.datasets.manifest import Manifest, Part
from selfsight.datamodules.datasets.search import Found, search, told
from selfsight.datamodules.datasets.splits import hold_out
from selfsight.datamodules.datasets.synthetic_shapes import SHAPES, VOID, draw
from selfsight.datamodules.datasets.unreadable import UnreadableFiles
from selfsight.datamodules.images.sets import ArrayImages, FileImages, ImageSet, join
from selfsight.errors import UserError
from selfsight.validation import Kind, each, expect, one_of, whole

Stats = Sequence[float]
Root = str | Path | None
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEWEST_AND_MOST = Kind(
    "a list of the fewest and the most shapes of an image",
    lambda v: each(whole(1)).fits(v) and len(v) == 2 and v[0] <= v[1],
)


def digits(
    *,
    image_size: int = 16,
    mean: Stats = (0.313,) * 3,
    std: Stats = (0.355,) * 3,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str = "digits",
) -> ImageData:
    """The 1,797 handwritten digits of scikit-learn (8 x 8, 17 levels of grey), enlarged once to ``image_size``.

    Nothing has to be downloaded.

    Args:
        test_fraction: share of every class that is held out: 0.2 leaves 1,437 to learn from and 360 to test.
        seed: of this choice.
        image_size, mean, std, name: see `ImageData`.
    """
    # read where it lies: importing scikit-learn for one small table would take longer than the first training step
    home = importlib.util.find_spec("sklearn")
    assert home is not None
    assert home.submodule_search_locations is not None
    rows = np.loadtxt(Path(home.submodule_search_locations[0], "datasets", "data", "digits.csv.gz"), delimiter=",")
    grey, labels = rows[:, :-1], rows[:, -1]
    levels = (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    side = (expect("dataset.image_size", image_size, whole(1)),) * 2
    enlarged = np.stack([cv2.resize(image, side, interpolation=cv2.INTER_CUBIC) for image in levels])
    pixels = torch.from_numpy(enlarged)[:, None].repeat(1, 3, 1, 1)
    images = ArrayImages(pixels, torch.from_numpy(labels.astype(np.int64)))
    train, test = hold_out(images.labels, len(images), test_fraction, seed)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(name, images.select(train), images.select(test), classes, image_size, mean, std)


def cifar10(
    root: Root = None,
    *,
    download: bool = False,
    image_size: int = 32,
    mean: Stats = (0.4914, 0.4822, 0.4465),
    std: Stats = (0.2470, 0.2435, 0.2616),
    name: str = "cifar10",
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs of 32 x 32 in 10 classes.

    Args:
        root: folder of ``cifar-10-batches-py``; None: see `checks.data_folder`.
        download: fetch what is not there (170 MB).
        image_size, mean, std, name: see `ImageData`.
    """
    return _cifar(
        root, download, "CIFAR10", "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta", ("labels", "label_names"),
        image_size, mean, std, name,
    )  # fmt: skip


def cifar100(
    root: Root = None,
    *,
    download: bool = False,
    image_size: int = 32,
    mean: Stats = (0.5071, 0.4865, 0.4409),
    std: Stats = (0.2673, 0.2564, 0.2762),
    name: str = "cifar100",
) -> ImageData:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 photographs of 32 x 32 in 100 classes.

    Args:
        root: folder of ``cifar-100-python``; None: see `checks.data_folder`.
        download: fetch what is not there (169 MB).
        image_size, mean, std, name: see `ImageData`.
    """
    return _cifar(
        root, download, "CIFAR100", "cifar-100-python",
        ["train"], ["test"], "meta", ("fine_labels", "fine_label_names"),
        image_size, mean, std, name,
    )  # fmt: skip


def _cifar(
    root: Root, download: bool, kind: str, folder: str, train: list[str], test: list[str], meta: str,
    keys: tuple[str, str], image_size: int, mean: Stats, std: Stats, name: str,
) -> ImageData:  # fmt: skip
    top = checks.data_folder(root)
    place = top / folder
    obtain(
        name,
        [place / file for file in (*train, *test, meta)],
        top,
        download,
        lambda d: getattr(d, kind)(top, download=True),
    )

    def images(files: list[str]) -> ArrayImages:
        batches = [arrays_only(place / file) for file in files]
        pixels = torch.cat([torch.from_numpy(np.array(batch["data"])).view(-1, 3, 32, 32) for batch in batches])
        return ArrayImages(pixels, torch.tensor([label for batch in batches for label in batch[keys[0]]]))

    classes = tuple(arrays_only(place / meta)[keys[1]])
    return ImageData(name, images(train), images(test), classes, image_size, mean, std)


def stl10(
    root: Root = None,
    *,
    download: bool = False,
    unlabelled: bool = True,
    image_size: int = 96,
    mean: Stats = (0.4408, 0.4279, 0.3867),
    std: Stats = (0.2682, 0.2610, 0.2686),
    name: str = "stl10",
) -> ImageData:
    """STL-10 (Coates, Lee, Ng 2011): 5,000 + 8,000 photographs of 96 x 96 in 10 classes, 100,000 without labels.

    Args:
        root: folder of ``stl10_binary``; None: see `checks.data_folder`.
        download: fetch what is not there (2.6 GB).
        unlabelled: learn from the 100,000, too; they take 2.6 GiB of memory.
        image_size, mean, std, name: see `ImageData`.
    """
    top = checks.data_folder(root)
    place = top / "stl10_binary"
    files = ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"]
    files += ["unlabeled_X.bin"] if unlabelled else []
    obtain(name, [place / file for file in files], top, download, lambda d: d.STL10(top, download=True))

    def images(part: str, labelled: bool = True) -> ArrayImages:
        # The file is mapped, not read: 100,000 images take 2.6 GiB. It holds columns first.
        stored = np.memmap(place / f"{part}_X.bin", np.uint8, mode="c")
        if stored.size % (3 * 96 * 96):
            raise damaged(place / f"{part}_X.bin")
        pixels = torch.from_numpy(stored).view(-1, 3, 96, 96).transpose(2, 3)
        labels = (
            torch.from_numpy(np.fromfile(place / f"{part}_y.bin", np.uint8).astype(np.int64)) - 1 if labelled else None
        )
        return ArrayImages(pixels, labels)

    classes = tuple((place / "class_names.txt").read_text().split())
    extra = images("unlabeled", labelled=False) if unlabelled else None
    return ImageData(name, images("train"), images("test"), classes, image_size, mean, std, extra)


def svhn(
    root: Root = None,
    *,
    download: bool = False,
    extra: bool = False,
    image_size: int = 32,
    mean: Stats = (0.4380, 0.4440, 0.4730),
    std: Stats = (0.1751, 0.1771, 0.1744),
    name: str = "svhn",
) -> ImageData:
    """Street View House Numbers (Netzer et al. 2011): 73,257 + 26,032 digits of 32 x 32.

    Args:
        root: folder of ``train_32x32.mat`` and its like; None: see `checks.data_folder`.
        download: fetch what is not there (250 MB, and 1.3 GB with ``extra``).
        extra: learn from 531,131 easier images, too.
        image_size, mean, std, name: see `ImageData`.
    """
    top = checks.data_folder(root)
    parts = ["train", "test", *(["extra"] if extra else [])]

    def fetch(datasets: Any) -> None:
        for part in parts:
            datasets.SVHN(top, split=part, download=True)

    obtain(name, [top / f"{part}_32x32.mat" for part in parts], top, download, fetch)

    def images(part: str) -> ArrayImages:
        from scipy.io import loadmat

        try:
            content = loadmat(top / f"{part}_32x32.mat")
        except (ValueError, OSError) as error:
            raise damaged(top / f"{part}_32x32.mat") from error
        pixels = torch.from_numpy(np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)))
        return ArrayImages(
            pixels, torch.from_numpy(content["y"].astype(np.int64).reshape(-1)) % 10
        )  # zero is stored as 10

    train = join(images("train"), images("extra") if extra else None)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(name, train, images("test"), classes, image_size, mean, std)


FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist(
    root: Root = None,
    *,
    download: bool = False,
    image_size: int = 28,
    mean: Stats = (0.2860,) * 3,
    std: Stats = (0.3530,) * 3,
    name: str = "fashion_mnist",
) -> ImageData:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey pictures of clothes, 28 x 28, in 10 classes.

    Args:
        root: folder of ``FashionMNIST/raw``; None: see `checks.data_folder`.
        download: fetch what is not there (31 MB).
        image_size, mean, std, name: see `ImageData`.
    """
    top = checks.data_folder(root)
    place = top / "FashionMNIST" / "raw"
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    present = [file if (file := place / stem).exists() else place / f"{stem}.gz" for stem in stems]
    obtain(name, present, top, download, lambda d: d.FashionMNIST(top, download=True))

    def images(part: str) -> ArrayImages:
        grey, labels = (idx_file(place / f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        return ArrayImages(grey[:, None].repeat(1, 3, 1, 1), labels.long())

    return ImageData(name, images("train"), images("t10k"), FASHION, image_size, mean, std)


def shapes(
    *,
    train: int = 1500,
    test: int = 100,
    image_size: int = 32,
    mean: Stats = (0.487,) * 3,
    std: Stats = (0.170,) * 3,
    drawn_size: int = 64,
    number: Sequence[int] = (1, 3),
    grey: bool = False,
    seed: int = 1,
    name: str = "shapes",
) -> ImageData:
    """Drawn images of discs, squares, triangles and rings, each kind with stripes of its own.

    With one shape an image its kind is the label; with several there is none.
    Nothing has to be downloaded; see `synthetic_shapes.draw`. The dense probes measure segmentation on other images of
    the same kind, drawn with seed 0.

    Args:
        train, test: number of images.
        drawn_size: side of the images, pixels.
        number: the fewest and the most shapes of an image.
        grey: without colours. Two crops of a coloured image are known by their colours, and a method whose views leave
            these as they are learns nothing else.
        seed: of all that is drawn.
        image_size, mean, std, name: see `ImageData`; ``image_size`` is the side of the views.
    """
    for key, value, low in (("train", train, 2), ("test", test, 0), ("drawn_size", drawn_size, 1), ("seed", seed, 0)):
        expect(f"dataset.{key}", value, whole(low))
    expect("dataset.number", number, FEWEST_AND_MOST)
    expect("dataset.grey", grey, one_of(True, False))
    rng = np.random.default_rng(seed)
    images, masks = map(np.stack, zip(*(draw(drawn_size, rng, number, grey) for _ in range(train + test)), strict=True))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).split([train, test])
    if tuple(number) == (1, 1):
        kinds = torch.from_numpy(np.where(masks == VOID, 0, masks).max((1, 2))).long() - 1
        labels: Sequence[Tensor | None] = kinds.split([train, test])
    else:
        labels = (None, None)
    parts = [ArrayImages(part, of_part) for part, of_part in zip(pixels, labels, strict=True)]
    classes = SHAPES[1:] if labels[0] is not None else ()
    return ImageData(name, parts[0], parts[1] if test else None, classes, image_size, mean, std)


def imagenet(
    root: Root = None,
    *,
    image_size: int = 224,
    eval_resize: int | None = 256,
    mean: Stats = IMAGENET_MEAN,
    std: Stats = IMAGENET_STD,
    resident: bool | str = False,
    max_unreadable: float = 0.001,
    name: str = "imagenet",
) -> ImageData:
    """ImageNet-1k (Russakovsky et al. 2015): 1,281,167 + 50,000 photographs in 1,000 classes.

    Args:
        root: folder of ``train`` and ``val``, each with one folder a class (n01440764, ...); None: ``imagenet`` in
            `checks.data_folder`. It cannot be downloaded.
        resident, max_unreadable: see `folder`.
        image_size, eval_resize, mean, std, name: see `ImageData`.
    """
    top = checks.data_folder(root, "imagenet")
    by_hand = "it cannot be downloaded: register at image-net.org, unpack its archives and sort val into class folders"
    obtain(name, [top / "train", top / "val"], top, False, None, by_hand)
    return _tree(top, None, image_size, eval_resize, mean, std, resident, max_unreadable, name)


def imagenet100(
    root: Root = None,
    *,
    classes: str | None = None,
    image_size: int = 224,
    eval_resize: int | None = 256,
    mean: Stats = IMAGENET_MEAN,
    std: Stats = IMAGENET_STD,
    resident: bool | str = False,
    max_unreadable: float = 0.001,
    name: str = "imagenet100",
) -> ImageData:
    """100 classes of ImageNet-1k, by Tian et al., "Contrastive Multiview Coding".

    Args:
        root: an ImageNet-1k tree, see `imagenet`.
        classes: a text file of other class folders, one a line; None: those of `IMAGENET100`.
        resident, max_unreadable: see `folder`.
        image_size, eval_resize, mean, std, name: see `ImageData`.
    """
    top = checks.data_folder(root, "imagenet")
    by_hand = "dataset.root has to be an ImageNet-1k tree, which cannot be downloaded: register at image-net.org"
    obtain(name, [top / "train", top / "val"], top, False, None, by_hand)
    chosen = IMAGENET100.split()
    if classes is not None:
        file = checks.path("dataset.classes", classes)
        if not file.is_file():
            raise UserError(f"dataset.classes is '{file}', which does not exist; name a text file of class folders.")
        chosen = list({line.split()[0] for line in checks.read_text(file).splitlines() if line.strip()})
    return _tree(top, sorted(chosen), image_size, eval_resize, mean, std, resident, max_unreadable, name)


#: The classes of Tian et al., "Contrastive Multiview Coding" (github.com/HobbitLong/CMC, imagenet100.txt), which the
#: literature on ImageNet-100 shares
IMAGENET100 = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""


def imagenette(
    root: Root = None,
    *,
    download: bool = False,
    size: str = "160px",
    image_size: int = 128,
    eval_resize: int | None = 144,
    mean: Stats = IMAGENET_MEAN,
    std: Stats = IMAGENET_STD,
    resident: bool | str = "auto",
    max_unreadable: float = 0.001,
    name: str = "imagenette",
) -> ImageData:
    """Imagenette (github.com/fastai/imagenette): 9,469 + 3,925 photographs of ten easy ImageNet classes.

    Args:
        root: folder of ``imagenette2``, ``imagenette2-320`` or ``imagenette2-160``; None: see `checks.data_folder`.
        download: fetch what is not there (99 MB for ``160px``, 326 MB for ``320px``, 1.5 GB for ``full``).
        size: shorter side of the stored images: ``160px``, ``320px`` or ``full``.
        resident, max_unreadable: see `folder`.
        image_size, eval_resize, mean, std, name: see `ImageData`.
    """
    expect("dataset.size", size, one_of("full", "320px", "160px"))
    top = checks.data_folder(root)
    place = top / ("imagenette2" if size == "full" else f"imagenette2-{size[:-2]}")

    def fetch(datasets: Any) -> None:
        datasets.Imagenette(top, size=size, download=True)

    obtain(name, [place / "train", place / "val"], top, download, fetch)
    return _tree(place, None, image_size, eval_resize, mean, std, resident, max_unreadable, name)


def _tree(
    top: Path, classes: list[str] | None, image_size: int, eval_resize: int | None, mean: Stats, std: Stats,
    resident: bool | str, max_unreadable: float, name: str,
) -> ImageData:  # fmt: skip
    """``train/class/image`` and ``val/class/image``; labels number the class folders in alphabetical order."""
    chosen = classes or sorted(p.name for p in (top / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    number = {folder: i for i, folder in enumerate(chosen)}
    found: list[Found] = []

    def files(part: str) -> FileImages:
        missing = [folder for folder in chosen if not (top / part / folder).is_dir()]
        if missing or not chosen:
            what = (
                f"{len(missing)} of the {len(chosen)} class folders, such as '{missing[0]}'"
                if missing
                else "class folders"
            )
            raise UserError(f"'{top / part}' lacks {what}: sort its images into one folder a class.")
        below = {folder: search(top / part / folder) for folder in chosen}
        found.extend(below.values())
        paths = [f"{folder}/{path}" for folder, each in below.items() for path in (*each.paths, *each.broken)]
        if not paths:
            raise UserError(f"'{top / part}' holds no image in its class folders.")
        return FileImages(top / part, paths, torch.tensor([number[path.split("/", 1)[0]] for path in paths]))

    train, test = files("train"), files("val")
    bad = UnreadableFiles(max_unreadable, len(train) + len(test))
    kept: list[ImageSet] = [keep_in_memory(images, resident, bad) for images in (train, test)]
    data = ImageData(
        name, kept[0], kept[1], tuple(chosen), image_size, mean, std, None, eval_resize, bad,
        about=tuple(filter(None, [told(found)])), root=top,
    )  # fmt: skip
    parts = {
        part: Part.of_files(images.addresses(top), images.labels, above=f"{folder}{os.sep}")
        for (part, images), folder in zip(data.parts().items(), ("train", "val"), strict=True)
    }
    return replace(data, found=Manifest(name, data.classes, tuple(data.mean), tuple(data.std), parts))
