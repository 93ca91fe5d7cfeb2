"""`batches=clusters`: stages that learn from images which those before find alike, and all of them as one backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import selfsight
from selfsight import cli
from selfsight.datamodules import ArrayImages, ImageData, ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.engine.stages import Stages
from selfsight.errors import UserError
from selfsight.methods.byol import BYOL
from selfsight.methods.simclrv2 import SimCLRv2

from ..small import SmallNet

CPU = torch.device("cpu")


def module(batch_size: int = 4) -> ImageDataModule:
    images = ArrayImages(torch.zeros(24, 3, 8, 8, dtype=torch.uint8))
    data = ImageData("none", images, None, (), 8, [0.5] * 3, [0.5] * 3)
    return ImageDataModule(data, [View(8, count=2)], batch_size=batch_size, num_workers=0)


def clustered(folder: Path, clusters: list[int]) -> str:
    """A run folder that knows the clusters of its images."""
    folder.mkdir()
    (folder / "clusters-3-0.json").write_text(json.dumps(clusters))
    return str(folder)


def test_batches_hold_images_that_every_stage_before_finds_alike(tmp_path: Path) -> None:
    first, second = [0] * 10 + [1] * 14, [0, 2] * 12
    runs = [clustered(tmp_path / "a", first), clustered(tmp_path / "b", second)]
    method, data = SimCLRv2(SmallNet()), module()
    Stages(clusters=3, runs=runs).arrange(method, data, CPU)
    both = [(a, b) for a, b in zip(first, second, strict=True)]
    for epoch in range(3):
        batches = [batch.indices.tolist() for batch in data.train_dataloader()]
        assert len(batches) == data.steps_per_epoch == 4
        assert all(len({both[i] for i in batch}) == 1 for batch in batches), epoch
    assert method.about == (
        "stage 2: batches from within 4 clusters that earlier stages find alike, 33% of the images are left out of "
        "each epoch, since clusters hold no whole batches: take a smaller batch_size or batches.clusters"
    )
    assert data.examples == 16


def test_the_first_stage_is_untouched() -> None:
    method, data = SimCLRv2(SmallNet()), module()
    before = data.order
    Stages().arrange(method, data, CPU)
    assert data.order is before
    assert (method.about, Stages().leads, Stages(stages=1).leads, Stages(runs="a").leads) == ("", True, False, False)


def test_what_has_no_negatives_or_no_whole_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BYOL compares no images; leave it out"):
        Stages().arrange(BYOL(SmallNet(), hidden_dim=4, dim=4), module(), CPU)
    run = clustered(tmp_path / "a", [0] * 10 + [1] * 14)
    with pytest.raises(UserError, match="batch_size is 15 and the largest cluster has 14 of the 24 images"):
        Stages(clusters=3, runs=run).arrange(SimCLRv2(SmallNet()), module(15), CPU)


def test_as_it_is_typed_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "debug=smoke",
        "report=false",
        "batches.stages=2",
        "batches.clusters=2",
        "evaluator=knn",
        "evaluator.k=[1]",
    ]
    cli.main(["pretrain", "recipe=mcl", *words, f"runs={tmp_path}", "name=x"])
    run = tmp_path / "x"
    assert "all stages" in (told := capsys.readouterr().out)
    assert "stage 1: batches from within 2 clusters" in told
    assert set(json.loads((run / "clusters-2-0.json").read_text())) == {0, 1}
    backbone, images = selfsight.load(run / "stages"), torch.rand(5, 3, 16, 16)
    parts = torch.cat([selfsight.load(folder)(images) for folder in (run, run / "stage1")], dim=1)
    torch.testing.assert_close(backbone(images), parts / parts.norm(dim=1, keepdim=True))
    kept = json.loads((run / "eval" / "stages.json").read_text())["result"]
    assert kept.keys() == {"stage 0", "stage 1", "all stages"}

    weights = (run / "stage1" / "backbone.safetensors").read_bytes()
    shutil.rmtree(run / "stage1")
    cli.main(["pretrain", f"resume={run}"])
    assert (run / "stage1" / "backbone.safetensors").read_bytes() == weights
    assert json.loads((run / "eval" / "stages.json").read_text())["result"] == kept
