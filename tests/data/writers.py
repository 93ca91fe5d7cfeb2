"""Small files in the formats of the data sets."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """A smooth random image, so that JPEG changes it little: ``[H, W, C]`` uint8, or ``[H, W]`` for one channel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    image = np.stack([np.asarray(plane) for plane in planes], -1)
    return image[..., 0] if channels == 1 else image


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(root: Path, names: list[str], first_seed: int = 0, **shape: int) -> None:
    """One image a name; the ending of the name says the format."""
    for seed, name in enumerate(names, first_seed):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed, **shape)).save(path)


def write_cifar10(root: Path, per_batch: int = 4) -> tuple[np.ndarray, list[int]]:
    """Returns all training images ``[N, 3, 32, 32]`` and their labels."""
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data, truth = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8), rng.integers(0, 10, per_batch).tolist()
        content = {"data": data, "labels": truth, "batch_label": name, "filenames": ["x.png"] * per_batch}
        (place / name).write_bytes(pickle.dumps(content, protocol=2))
        if name != "test_batch":
            images.append(data.reshape(-1, 3, 32, 32))
            labels += truth
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, protocol=2))
    return np.concatenate(images), labels


def write_cifar100(root: Path, images: int = 6) -> None:
    place = root / "cifar-100-python"
    place.mkdir(parents=True)
    for name in ("train", "test"):
        data = np.full((images, 3072), 7 if name == "train" else 9, np.uint8)
        content = {"data": data, "fine_labels": list(range(images)), "coarse_labels": [0] * images}
        (place / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"fine {i}" for i in range(100)]
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["c"]}, protocol=2))


def write_stl10(root: Path, count: int = 3) -> np.ndarray:
    """Returns the training images ``[N, 3, 96, 96]``; the file holds them column by column."""
    place = root / "stl10_binary"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
    for part, images in (("train", train), ("test", train[:2]), ("unlabeled", 255 - train)):
        (place / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        if part != "unlabeled":
            (place / f"{part}_y.bin").write_bytes(bytes(range(1, len(images) + 1)))
    (place / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    return train


def write_svhn(root: Path, part: str, labels: list[int], seed: int = 0) -> np.ndarray:
    """Returns the images ``[N, 3, 32, 32]``; labels are those of the file (10 is a zero)."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
    savemat(root / f"{part}_32x32.mat", {"X": images, "y": np.array(labels, np.uint8)[:, None]})
    return images.transpose(3, 2, 0, 1)


def idx(array: np.ndarray) -> bytes:
    """MNIST's format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()
