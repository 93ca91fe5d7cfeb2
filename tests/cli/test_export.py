"""`selfsight export`: what comes out is read by the library it is for, and gives the same numbers there."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import selfsight
from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone, to_detectron2
from selfsight.errors import UserError


class Conv(nn.Conv2d):
    """detectron2's convolution: its norm is a part of it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Block(nn.Module):
    """Its bottleneck with STRIDE_IN_1X1 false, or its basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            self.conv1 = Conv(inputs, outputs // 4, 1)
            self.conv2 = Conv(outputs // 4, outputs // 4, 3, stride)
            self.conv3 = Conv(outputs // 4, outputs, 1)
        else:
            self.conv1, self.conv2 = Conv(inputs, outputs, 3, stride), Conv(outputs, outputs, 3)
        self.shortcut = Conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        out = self.conv3(F.relu(out)) if hasattr(self, "conv3") else out
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Twin(nn.Module):
    """A ResNet under the names that detectron2's has."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 64, 7, 2)
        inputs, outputs = 64, 256 if bottleneck else 64
        for stage, depth in enumerate(depths):
            blocks = []
            for b in range(depth):
                blocks.append(Block(inputs, outputs, 2 if stage and not b else 1, bottleneck))
                inputs = outputs
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))
            outputs *= 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)  # type: ignore[operator]
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"res{stage}")(x)
        return x


def moved(name: str) -> nn.Module:
    """A network whose BatchNorm has seen images, so that its statistics count."""
    torch.manual_seed(0)
    net = create(name, zero_init_last=False)
    net(torch.randn(4, 3, 64, 64))
    return net.eval()


@pytest.mark.parametrize(("name", "depths"), [("resnet50", (3, 4, 6, 3)), ("resnet18", (2, 2, 2, 2))])
def test_detectron2_takes_our_resnets(name: str, depths: tuple[int, ...]) -> None:
    net, theirs = moved(name), Twin(depths, bottleneck=name == "resnet50").eval()
    theirs.load_state_dict(to_detectron2(net), strict=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(theirs(x), net.forward_features(x))  # type: ignore[operator]


def test_names_of_a_resnet50() -> None:
    with torch.device("meta"):
        names = Twin((3, 4, 6, 3), bottleneck=True).state_dict().keys()
    assert len(names) == 318
    assert {
        "stem.conv1.weight", "stem.conv1.norm.weight", "stem.conv1.norm.running_mean", "res2.0.shortcut.weight",
        "res2.0.shortcut.norm.bias", "res5.2.conv3.norm.bias",
    } <= names  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("resnet18", {"stem": "cifar"}, "begin with a 7 x 7 convolution and this one with 3 x 3"),
        ("convnext_atto", {}, "no counterpart in torchvision"),
    ],
)
def test_detectron2_has_no_such_network(name: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        to_detectron2(create(name, **options))  # type: ignore[arg-type]


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = moved("resnet18"), torch.randn(1, 3, 64, 64)
    spec = {"backbone": {"name": "resnet18"}, "image_size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    export_backbone(net, spec, run)
    wanted = net(x)

    cli.main(["export", f"run={run}", "format=detectron2"])
    assert "PIXEL_MEAN [127.5, 102.0, 76.5]" in capsys.readouterr().out
    content = pickle.loads((run / "backbone.detectron2.pkl").read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("selfsight", True)
    twin = Twin((2, 2, 2, 2), bottleneck=False).eval()
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in content["model"].items()})
    torch.testing.assert_close(twin(x).mean((2, 3)), wanted)

    cli.main(["export", f"run={run}", "format=torchvision"])
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(run / "backbone.torchvision.pth", weights_only=True))
    torch.testing.assert_close(theirs.eval()(x), wanted)

    cli.main(["export", f"run={run}", "format=timm"])
    file = str(run / "backbone.timm.safetensors")
    torch.testing.assert_close(timm.create_model("resnet18", num_classes=0, checkpoint_path=file).eval()(x), wanted)

    cli.main(["export", f"backbone={run}", "format=safetensors", f"out={tmp_path / 'copy'}"])
    torch.testing.assert_close(selfsight.load(tmp_path / "copy")(x), wanted)
    assert json.loads((tmp_path / "copy" / "backbone.json").read_text())["mean"] == spec["mean"]

    capsys.readouterr()
    before = sorted(run.iterdir())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for words, told in (
        ([f"run={run}"], "format has to be given"),
        ([f"run={run}", "format=detectron"], "Did you mean 'detectron2'?"),
        ([f"run={run}", "format=onnx"], "pip install 'selfsight[onnx]'"),
        ([f"run={run}", "format=safetensors"], "out=PATH"),
        ([f"backbone={run}", "format=timm"], "out=PATH"),
        (["format=timm"], "run=runs/NAME"),
        ([f"run={run}", "format=timm", f"out={tmp_path / 'none' / 'x.pth'}"], "there is no folder"),
        ([f"run={tmp_path}", "format=timm"], "is no run folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", *words])
        assert stop.value.code != 0
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert sorted(run.iterdir()) == before
