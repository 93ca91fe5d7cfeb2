"""Each named data set is read from files in its own format; what is missing or damaged is said in one sentence."""

from __future__ import annotations

import gzip
import inspect
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from selfsight import conf, datamodules
from selfsight.datamodules import (
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    imagenet,
    imagenet100,
    imagenette,
    shapes,
    stl10,
    svhn,
)
from selfsight.datamodules.datasets.sources import IMAGENET100
from selfsight.datamodules.datasets.synthetic_shapes import VOID, draw
from selfsight.errors import UserError

from . import writers

#: files that name a function; `shards` is `folder` with two values of its own
CONFIGURATIONS = [
    file
    for file in sorted((Path(conf.__file__).parent / "dataset").glob("*.yaml"))
    if "_target_" in OmegaConf.load(file)
]
LOOK: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
TREE: dict[str, Any] = {**LOOK, "image_size": 16, "eval_resize": 18, "resident": False, "max_unreadable": 0.0}


def test_digits_are_split_by_seed_and_by_class() -> None:
    first, again, other = (digits(image_size=12, test_fraction=0.2, seed=seed, **LOOK) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.pixels.shape == (1437, 3, 12, 12)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    share = first.test.labels.bincount() / (first.test.labels.bincount() + first.train.labels.bincount())
    assert share.min() > 0.19
    assert share.max() < 0.21
    assert int(first.train.pixels.max()) == 255


def test_shapes_are_drawn_anew_from_their_seed() -> None:
    options: dict[str, Any] = {**LOOK, "train": 5, "test": 2, "image_size": 32, "drawn_size": 48, "number": (2, 4)}
    first, again, other = (shapes(seed=seed, **options) for seed in (1, 1, 2))
    assert first.train.pixels.shape == (5, 3, 48, 48)
    assert (len(first.test), first.train.labels, first.num_classes) == (2, None, 0)
    assert torch.equal(first.test.pixels, again.test.pixels)
    assert not torch.equal(first.test.pixels, other.test.pixels)
    rng = np.random.default_rng(1)
    drawn, masks = zip(*(draw(48, rng, (2, 4)) for _ in range(5)), strict=True)
    assert np.array_equal(first.train.read(4), drawn[4])
    kinds = [len(set(np.unique(mask)) - {0, VOID}) for mask in masks]
    assert max(kinds) > 1  # several shapes in an image
    assert shapes(seed=1, **{**options, "test": 0}).test is None


def test_grey_shapes_have_no_colour_and_the_same_forms() -> None:
    options: dict[str, Any] = {**LOOK, "train": 40, "test": 0, "image_size": 32, "drawn_size": 32, "number": (1, 1)}
    data, coloured = shapes(grey=True, **options), shapes(**options)
    assert torch.equal(data.train.pixels[:, 0], data.train.pixels[:, 2])
    assert not torch.equal(coloured.train.pixels[:, 0], coloured.train.pixels[:, 2])
    brightness = data.train.pixels[:, 0, 0].float().mean(1)  # of the ground, in the first row
    assert brightness.max() - brightness.min() > 100
    rng = np.random.default_rng(1)
    image, mask = draw(32, rng, (1, 1), grey=True)
    assert np.array_equal(data.train.read(0), image)
    assert set(np.unique(mask)) - {0, VOID} == {int(data.train.labels[0]) + 1}


def test_cifar10(tmp_path: Path) -> None:
    images, labels = writers.write_cifar10(tmp_path)
    data = cifar10(root=str(tmp_path), download=False, image_size=32, **LOOK)
    assert np.array_equal(data.train.pixels.numpy(), images)
    assert data.train.labels.tolist() == labels
    assert len(data.test) == 4
    assert data.classes[3] == "class 3"
    assert np.array_equal(data.train.read(2), images[2].transpose(1, 2, 0))


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    writers.write_cifar100(tmp_path)
    data = cifar100(root=str(tmp_path), download=False, image_size=32, **LOOK)
    assert data.num_classes == 100
    assert data.train.labels.tolist() == list(range(6))
    assert (int(data.train.pixels[0, 0, 0, 0]), int(data.test.pixels[0, 0, 0, 0])) == (7, 9)


def test_stl10_turns_columns_into_rows(tmp_path: Path) -> None:
    images = writers.write_stl10(tmp_path)
    data = stl10(root=str(tmp_path), download=False, unlabelled=True, image_size=96, **LOOK)
    assert np.array_equal(data.train.pixels.numpy(), images)
    assert data.train.labels.tolist() == [0, 1, 2]
    everything = data.everything()
    assert everything.labels.tolist() == [0, 1, 2, -1, -1, -1]
    assert np.array_equal(everything.pixels[3:].numpy(), 255 - images)
    assert stl10(root=str(tmp_path), download=False, unlabelled=False, image_size=96, **LOOK).unlabelled is None


def test_svhn_stores_zero_as_ten(tmp_path: Path) -> None:
    images = writers.write_svhn(tmp_path, "train", [10, 1, 9])
    writers.write_svhn(tmp_path, "test", [2])
    writers.write_svhn(tmp_path, "extra", [5, 10], seed=1)
    data = svhn(root=str(tmp_path), download=False, extra=False, image_size=32, **LOOK)
    assert data.train.labels.tolist() == [0, 1, 9]
    assert np.array_equal(data.train.pixels.numpy(), images)
    more = svhn(root=str(tmp_path), download=False, extra=True, image_size=32, **LOOK)
    assert more.train.labels.tolist() == [0, 1, 9, 5, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist(tmp_path: Path, packed: bool) -> None:
    place = tmp_path / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, count in (("train", 5), ("t10k", 2)):
        contents = {"images-idx3": images[:count], "labels-idx1": np.arange(count)}
        for what, content in contents.items():
            file, data = place / f"{part}-{what}-ubyte", writers.idx(content)
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(data)) if packed else file.write_bytes(data)
    data = fashion_mnist(root=str(tmp_path), download=False, image_size=28, **LOOK)
    assert torch.equal(data.train.pixels, torch.from_numpy(images)[:, None].expand(5, 3, 28, 28))
    assert data.test.labels.tolist() == [0, 1]
    assert data.classes[9] == "Ankle boot"


def write_tree(root: Path, classes: list[str]) -> None:
    for part, count in (("train", 3), ("val", 2)):
        writers.write_pictures(root / part, [f"{c}/{c}_{i}.JPEG" for c in classes for i in range(count)])


def test_imagenet_numbers_class_folders_in_order(tmp_path: Path) -> None:
    write_tree(tmp_path, ["n02", "n01", "n03"])
    data = imagenet(root=str(tmp_path), **TREE)
    assert data.classes == ("n01", "n02", "n03")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.train.name(3) == f"n02{os.sep}n02_0.JPEG"
    assert data.test.read(0).shape == (24, 32, 3)
    resident = imagenet(root=str(tmp_path), **{**TREE, "resident": True})
    assert resident.train.in_memory
    assert np.array_equal(resident.train.read(4), data.train.read(4))


def test_imagenet100_takes_its_classes_from_a_larger_tree(tmp_path: Path) -> None:
    names = IMAGENET100.split()
    assert len(set(names)) == 100
    writers.write_pictures(tmp_path, [f"{part}/{c}/{c}_0.JPEG" for c in [*names, "n99"] for part in ("train", "val")])
    data = imagenet100(root=str(tmp_path), classes=None, **TREE)
    assert data.classes == tuple(sorted(names))
    assert len(data.train) == len(data.test) == 100
    (tmp_path / "list.txt").write_text(f"n99\n{names[0]} a name\n")
    few = imagenet100(root=str(tmp_path), classes=str(tmp_path / "list.txt"), **TREE)
    assert few.classes == (names[0], "n99")
    (tmp_path / "list.txt").write_text("n98\nn99\n")
    with pytest.raises(UserError, match="lacks 1 of the 2 class folders, such as 'n98'"):
        imagenet100(root=str(tmp_path), classes=str(tmp_path / "list.txt"), **TREE)


def test_imagenette_finds_the_folder_of_its_size(tmp_path: Path) -> None:
    write_tree(tmp_path / "imagenette2-160", ["n01", "n02"])
    data = imagenette(root=str(tmp_path), download=False, size="160px", **TREE)
    assert (len(data.train), len(data.test)) == (6, 4)
    with pytest.raises(UserError, match=r"dataset.size is '200px'; full, 320px or 160px"):
        imagenette(root=str(tmp_path), download=False, size="200px", **TREE)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (cifar10, {"image_size": 32}),
        (cifar100, {"image_size": 32}),
        (stl10, {"image_size": 96, "unlabelled": True}),
        (svhn, {"image_size": 32, "extra": False}),
        (fashion_mnist, {"image_size": 28}),
        (imagenette, {**TREE, "size": "160px"}),
    ],
)
def test_missing_set_is_not_fetched_unasked(source: Any, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as said:
        source(root=str(tmp_path / "none"), download=False, **{**LOOK, **options})
    assert f"looked for in '{tmp_path / 'none'}'" in str(said.value)
    assert "dataset.download=true" in str(said.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("source", [imagenet, imagenet100])
def test_imagenet_says_how_to_get_it(source: Any, tmp_path: Path) -> None:
    options = {**TREE, "classes": None} if source is imagenet100 else TREE
    with pytest.raises(UserError, match=r"image-net.org"):
        source(root=str(tmp_path), **options)


def test_incomplete_set_names_the_file(tmp_path: Path) -> None:
    writers.write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4' is not there"):
        cifar10(root=str(tmp_path), download=False, image_size=32, **LOOK)


def test_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", no_network)
    with pytest.raises(UserError, match=r"'cifar10' could not be downloaded to .*: no route to host"):
        cifar10(root=str(tmp_path), download=True, image_size=32, **LOOK)


def test_damaged_files(tmp_path: Path) -> None:
    writers.write_cifar10(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:100])
    with pytest.raises(UserError, match="data_batch_2' is damaged"):
        cifar10(root=str(tmp_path), download=False, image_size=32, **LOOK)
    writers.write_stl10(tmp_path)
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(b"12345")
    with pytest.raises(UserError, match=r"train_X.bin' is damaged"):
        stl10(root=str(tmp_path), download=False, unlabelled=False, image_size=96, **LOOK)


class Malice:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_pickles_only_give_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writers.write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(UserError, match=r"batches.meta' is damaged"):
        cifar10(root=str(tmp_path), download=False, image_size=32, **LOOK)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_configuration_gives_what_its_function_takes(file: Path) -> None:
    options = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    source = getattr(datamodules, options.pop("_target_").removeprefix("selfsight.datamodules."))
    assert options["name"] == source.__name__ == file.stem
    assert set(options) == set(inspect.signature(source).parameters)
