"""The whole grid runs: every method on several backbones and data sets, as `debug=smoke` shrinks them."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfsight import cli

from .test_pretrain import photographs

METHODS = ("simclrv2", "swav", "pixpro", "supcon", "rotation", "spark", "simmatchv2")
#: with the side of the images that suits its stem
BACKBONES = {"resnet_digits": 32, "resnet18_cifar": 32, "resnet18": 64, "regnetx_002": 64}
DATASETS = ("digits", "folder")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_grid(method: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = []
    if dataset == "folder":
        where.append(f"dataset.root={photographs(tmp_path / 'photos', 60, classes=3, size=34)}")
    if method == "simmatchv2":
        where.append("labels.per_class=2")
    for backbone, size in BACKBONES.items():
        words = [
            f"method={method}",
            f"backbone={backbone}",
            f"dataset={dataset}",
            *where,
            "debug=smoke",
            "report=false",
        ]
        cli.main(["pretrain", *words, f"dataset.image_size={size}", f"runs={tmp_path / 'runs'}", f"name={backbone}"])
        assert (tmp_path / "runs" / backbone / "summary.json").is_file()
        assert (tmp_path / "runs" / backbone / "backbone.safetensors").is_file()
