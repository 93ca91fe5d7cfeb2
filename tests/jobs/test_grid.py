"""Every method on several backbones and data sets, as `debug=smoke` shrinks them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from selfsight import cli
from selfsight.runs.folder import RunFolder

from .test_evaluate import refused
from .test_pretrain import photographs

ROOT = Path(__file__).parents[2]
METHODS = ("simclrv2", "swav", "pixpro", "supcon", "rotation", "spark", "simmatchv2")
#: with the side of the images that suits its stem
BACKBONES = {"resnet_digits": 32, "resnet18_cifar": 32, "resnet18": 64, "regnetx_002": 64}
DATASETS = ("digits", "folder")
#: each on a network of either kind, of those that are made for the digits
LATER = ("byol", "mocov3", "simsiam", "vicreg", "barlow", "lejepa", "dino")
KINDS = ("resnet_digits", "vit_digits")
RECIPES = ROOT / "conf" / "recipe" / "digits"
#: which go on from another run, or compare several
NOT_ALONE = {"distillation", "few_labels", "few_labels_short", "mcl"}


def grid() -> Iterator[tuple[str, str, str]]:
    """Every method with every backbone, every method and every backbone with every data set: each pair once or more."""
    for i, method in enumerate(METHODS):
        for j, backbone in enumerate(BACKBONES):
            yield method, backbone, DATASETS[(i + j) % len(DATASETS)]


@pytest.mark.parametrize(("method", "backbone", "dataset"), list(grid()))
def test_grid(method: str, backbone: str, dataset: str, tmp_path: Path) -> None:
    words = [f"method={method}", f"backbone={backbone}", f"dataset={dataset}", "debug=smoke", "report=false"]
    if dataset == "folder":
        words.append(f"dataset.root={photographs(tmp_path / 'photos', 60, classes=3, size=34)}")
    words.append("labels.per_class=2" if method == "simmatchv2" else "limit_images=24")
    if backbone != "resnet_digits":  # the table at the end is the same for all
        words.append("evaluator.final={}")
    size = BACKBONES[backbone]
    cli.main(["pretrain", *words, f"dataset.image_size={size}", f"runs={tmp_path / 'runs'}", f"name={backbone}"])
    assert (tmp_path / "runs" / backbone / "summary.json").is_file()
    assert (tmp_path / "runs" / backbone / "backbone.safetensors").is_file()


@pytest.mark.parametrize(("method", "backbone"), [*product(LATER, KINDS), ("mae", "vit_digits")])
def test_later_methods_on_both_kinds(method: str, backbone: str, tmp_path: Path) -> None:
    smoke(tmp_path, f"method={method}", f"backbone={backbone}", "dataset=digits", "limit_images=24")


def test_what_takes_transformers_alone_names_what_takes_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "pretrain", "method=mae", "backbone=resnet_digits", "debug=smoke", f"runs={tmp_path}")
    assert "MAE" in told
    assert "method=spark for a convolutional network" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", sorted({path.stem for path in RECIPES.glob("*.yaml")} - NOT_ALONE))
def test_the_recipes_of_the_digits_train(recipe: str, tmp_path: Path) -> None:
    smoke(tmp_path, f"recipe=digits/{recipe}", "limit_images=200")  # of which each class has its labels


def smoke(runs: Path, *words: str) -> None:
    """Two steps, which have gradients, and a network at the end."""
    cli.main(["pretrain", "debug=smoke", *words, "report=false", "evaluator.final={}", f"runs={runs}", "name=run"])
    folder = RunFolder(runs / "run")
    (row,) = folder.read_metrics()
    assert row["step"] == "2"
    assert math.isfinite(float(row["loss"]))
    assert float(row["grad_norm"]) > 0
    assert folder.summary.is_file()
    assert (folder.path / "backbone.safetensors").is_file()
