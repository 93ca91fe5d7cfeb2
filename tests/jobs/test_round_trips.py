"""Weights out and in again: what a run has learned gives the same features in every library, and goes on from there."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import selfsight
from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone, export_onnx
from selfsight.errors import UserError
from tests.checkpoints.published import lively, swav, write

SMALL = "dataset=digits limit_images=64 batch_size=32 evaluator=knn report=false trainer.max_epochs=1"


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def features(run: Path, x: Tensor) -> Tensor:
    with torch.no_grad():
        return selfsight.load(run)(x)


def of_timm(run: Path, folder: Path, x: Tensor) -> Tensor:
    cli.main(["export", f"weights={run}", "format=timm", f"out={folder / 'timm.safetensors'}"])
    file = str(folder / "timm.safetensors")
    net = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1], checkpoint_path=file).eval()
    with torch.no_grad():
        return net(x)


def of_torchvision(run: Path, folder: Path, x: Tensor) -> Tensor:
    cli.main(["export", f"weights={run}", "format=torchvision", f"out={folder / 'torchvision.pth'}"])
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Identity()
    net.load_state_dict(torch.load(folder / "torchvision.pth", weights_only=True))
    with torch.no_grad():
        return net.eval()(x)


def by_onnx(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])


def test_from_pretraining_to_every_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["backbone=resnet18", "+backbone.layers=[1,1,1,1]"]
    cli.main(["pretrain", *SMALL.split(), *network, f"runs={tmp_path}", "name=run"])
    run, x = tmp_path / "run", images(2, 64, 64)
    wanted = features(run, x)
    for found in (of_timm(run, tmp_path, x), of_torchvision(run, tmp_path, x)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    capsys.readouterr()
    cli.main(["export", f"run={run}", "format=onnx"])
    assert "; any number of images, of any size" in capsys.readouterr().out
    for size in ((2, 16, 16), (1, 33, 70), (3, 64, 32)):
        found = by_onnx(run / "backbone.onnx", images(*size))
        torch.testing.assert_close(found, features(run, images(*size)), rtol=0, atol=1e-5)


def test_from_its_authors_through_a_run_to_every_library(tmp_path: Path) -> None:
    """SwAV's file, imported as a run, trained on, exported."""
    source, run, x = write(swav(), tmp_path), tmp_path / "run", images(2, 64, 64)
    cli.main(["import", f"source={source}", f"out={run}", f"pretrain={SMALL}"])
    before = features(run, x)
    torch.testing.assert_close(before, swav().features(x), rtol=0, atol=1e-5)
    cli.main(["pretrain", f"resume={run}"])
    wanted = features(run, x)
    assert not torch.allclose(wanted, before, atol=1e-4)
    for found in (of_timm(run, tmp_path, x), of_torchvision(run, tmp_path, x)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_onnx_of_a_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 1}
    net = lively(create(**arguments))  # type: ignore[arg-type]
    export_backbone(net, {"backbone": arguments, "image_size": 32, "mean": None, "std": None}, tmp_path)
    cli.main(["export", f"weights={tmp_path}", "format=onnx", f"out={tmp_path / 'net.onnx'}"])
    free = "of any size" in capsys.readouterr().out
    for size in ((1, 32, 32), (3, 32, 32), *([(2, 64, 48)] if free else [])):
        x = images(*size)
        with torch.no_grad():
            torch.testing.assert_close(by_onnx(tmp_path / "net.onnx", x), net(x), rtol=0, atol=1e-5)


class Spectrum(nn.Module):
    """Features that ONNX has no word for."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x[:, 0, :4, :4] * self.scale)


def test_a_layer_that_onnx_cannot_express_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ONNX cannot express this Spectrum \(.*\); format=safetensors takes") as error:
        export_onnx(Spectrum(), tmp_path / "net.onnx", 8)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "net.onnx").exists()


def test_weights_in_half_precision_come_back_as_they_are_and_pointers_are_told(tmp_path: Path) -> None:
    net = create("resnet10_slim", width=8).half()
    export_backbone(net, {"backbone": {"name": "resnet10_slim", "width": 8}}, tmp_path)
    assert {p.dtype for p in selfsight.load(tmp_path).parameters()} == {torch.float16}
    for content, told in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102400\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "is a web page and holds no weights"),
        (b"", "is empty"),
    ):
        (tmp_path / "backbone.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=told) as error:
            selfsight.load(tmp_path)
        assert "\n" not in str(error.value)
