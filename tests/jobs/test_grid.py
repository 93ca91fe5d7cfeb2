"""Every method on several backbones and data sets, as `debug=smoke` shrinks them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsight import cli

from .test_pretrain import photographs

METHODS = ("simclrv2", "swav", "pixpro", "supcon", "rotation", "spark", "simmatchv2")
#: with the side of the images that suits its stem
BACKBONES = {"resnet_digits": 32, "resnet18_cifar": 32, "resnet18": 64, "regnetx_002": 64}
DATASETS = ("digits", "folder")


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
