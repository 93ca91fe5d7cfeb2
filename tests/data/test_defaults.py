"""What a person types in Python: a line for each thing, with the defaults of the signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

import selfsight.datamodules as parts
from selfsight.datamodules import ImageDataModule, SemiDataModule, cifar10, digits, folder, shapes
from selfsight.datamodules.datasets.synthetic_shapes import VOID, draw
from selfsight.datamodules.views.view import View
from selfsight.datamodules.views.views import names, views
from selfsight.errors import UserError

from .writers import write_cifar10, write_pictures

#: files that name a function; `shards` is `folder` with two values of its own
DATASETS = [
    file
    for file in sorted((Path(parts.__file__).parents[1] / "conf" / "dataset").glob("*.yaml"))
    if "_target_" in OmegaConf.load(file)
]


def test_a_folder_to_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "photos", [f"{c}/{i}.png" for c in "ab" for i in range(20)])
    monkeypatch.chdir(tmp_path)
    data = folder("photos")
    module = ImageDataModule(data, views("swav", data.image_size), batch_size=8)
    batch = next(iter(module.train_dataloader()))
    assert [view.shape[-1] for view in batch.views] == [96] * 2 + [41] * 6
    assert data.classes == ("a", "b")


def test_what_comes_with_the_package() -> None:
    data = digits()
    assert (len(data.train), len(data.test), data.image_size) == (1437, 360, 16)
    batch = next(iter(ImageDataModule(data, views("digits", 16)).train_dataloader()))
    assert (len(batch), len(batch.views)) == (256, 2)
    few = SemiDataModule(data, views("fixmatch", 16), labels={"per_class": 4}, batch_size=8)
    both = next(iter(few.train_dataloader()))
    assert (len(both.labelled), len(both.unlabelled)) == (8, 56)
    assert len(shapes(train=4, test=2).train) == 4


def test_where_data_sets_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "there")
    assert len(cifar10(tmp_path / "there").train) == 20
    monkeypatch.setenv("SELFSIGHT_DATA", str(tmp_path / "there"))
    assert len(cifar10().train) == 20
    monkeypatch.delenv("SELFSIGHT_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="looked for in 'data'"):
        cifar10()


@pytest.mark.parametrize("file", DATASETS, ids=[file.stem for file in DATASETS])
def test_a_data_set_has_one_default(file: Path) -> None:
    """What a file states is what its signature has: a value that stands in both places is the same."""
    node: Any = OmegaConf.to_container(OmegaConf.load(file))
    signature = inspect.signature(get_object(node.pop("_target_"))).parameters
    stated = {key: value for key, value in node.items() if "${" not in str(value)}
    assert stated == {key: _plain(signature[key].default) for key in stated}
    assert all(p.default is not inspect.Parameter.empty for p in signature.values())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", names())
def test_views_by_name(name: str) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = views(name, 64, mean, std)
    assert all(isinstance(view, View) for view in found.values())
    assert max(view.size for view in found.values()) == 64
    own = name.startswith(("simclr", "finetune_simclr", "supcon_"))
    assert all((view.mean, view.std) == (mean, std) for view in found.values()) != own


def test_views_that_there_are_none_of() -> None:
    with pytest.raises(UserError, match=r"there are no views 'swaf'; choose from .* Did you mean 'swav'\?"):
        views("swaf")


def test_facts_are_what_methods_ask_for() -> None:
    data = digits()
    told = ImageDataModule(data, [View(16)]).facts
    assert told["num_classes"] == 10
    assert told["classes"] == data.classes
    assert told["num_images"] == 1437
    assert torch.equal(told["labels"], data.train.labels)
    few = SemiDataModule(data, views("fixmatch", 16), labels={"per_class": 4}, batch_size=8, include_labelled=False)
    assert few.facts["labels"].bincount().tolist() == [4] * 10
    assert (few.facts["num_unlabelled"], few.facts["num_images"]) == (1397, 1437)
    assert few.data is few.dataset


def test_the_checks_come_without_torch() -> None:
    code = "import sys, selfsight.datamodules.datasets.checks as c; assert 'torch' not in sys.modules; c.path('x', 'y')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shape_alone_is_its_class() -> None:
    """Discs, squares, triangles and rings have stripes of 5, 6, 7 and 8 pixels; the labels are those of the masks."""
    data = shapes(train=40, test=8, number=(1, 1), drawn_size=32)
    labels = data.train.labels
    assert data.classes == ("disc", "square", "triangle", "ring")
    assert labels is not None
    assert set(labels.tolist()) == {0, 1, 2, 3}
    rng = np.random.default_rng(1)
    drawn = [draw(32, rng, (1, 1)) for _ in range(40)]
    for i, (image, mask) in enumerate(drawn):
        assert set(np.unique(mask)) - {0, VOID} == {int(labels[i]) + 1}
        assert np.array_equal(data.train.read(i), image)
    assert shapes(train=4, test=2).train.labels is None
    assert shapes(train=4, test=2).classes == ()
