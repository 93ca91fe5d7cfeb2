"""`selfsight export`: what comes out is read by the library it is for, and gives the same numbers there."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import selfsight
from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone, to_detectron2
from selfsight.checkpoints.load import start_from
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
    (run / "config.yaml").write_text("job: pretrain\n")
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


def exported(place: Path, name: str, **options: object) -> tuple[nn.Module, Path]:
    """A network in eval mode, and the folder it was exported to."""
    place.mkdir()
    torch.manual_seed(0)
    net = create(name, **options)  # type: ignore[arg-type]
    net(torch.randn(4, 3, 32, 32))
    spec = {"backbone": {"name": name, **options}, "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    export_backbone(net, spec, place)
    return net.eval(), place


@pytest.mark.parametrize("form", ["timm", "torchvision"])
def test_a_stem_for_small_images_is_told(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is enough to read the file."""
    net, place = exported(tmp_path / "net", "resnet18", stem="cifar", zero_init_last=False)
    cli.main(["export", f"backbone={place}", f"format={form}", f"out={tmp_path / 'weights'}"])
    (file,) = tmp_path.glob("weights.*")  # with the ending of its format
    told = capsys.readouterr().out
    if form == "timm":
        assert "net = timm.create_model('resnet18', num_classes=0, zero_init_last=False)" in told
        theirs, weights = timm.create_model("resnet18", num_classes=0), load_file(file)
    else:
        theirs, weights = torchvision.models.resnet18(), torch.load(file, weights_only=True)
        theirs.fc = nn.Identity()
    assert "before loading, net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False) and net.maxpool = " in told
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    theirs.load_state_dict(weights)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs.eval()(x), net(x))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("resnet10_slim", {"width": 8}, "timm has no 'resnet10_slim', which is a network of ours"),
        ("simclr_resnet18", {}, "timm has no 'simclr_resnet18', which is a network of ours"),
        ("mobilenetv3_small_050", {}, "timm's 'mobilenetv3_small_050' has other layers than this one"),
    ],
)
def test_timm_has_no_such_network(
    name: str, options: dict[str, int], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, place = exported(tmp_path / "net", name, **options)
    with pytest.raises(SystemExit):
        cli.main(["export", f"backbone={place}", "format=timm", f"out={tmp_path / 'file'}"])
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("file*"))


def test_timm_knows_the_file_by_its_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, place = exported(tmp_path / "net", "resnet18")
    cli.main(["export", f"backbone={place}", "format=timm", f"out={tmp_path / 'file'}"])
    x = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "file.safetensors"))
    torch.testing.assert_close(theirs.eval()(x), net(x))
    with pytest.raises(SystemExit):
        cli.main(["export", f"backbone={place}", "format=timm", f"out={tmp_path / 'file.pth'}"])
    assert "'file.pth' has another: out=NAME.safetensors." in capsys.readouterr().err


def test_arguments_of_the_network_are_told_to_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, place = exported(tmp_path / "net", "resnet18", output_stride=16, drop_path=0.1)
    cli.main(["export", f"backbone={place}", "format=timm", f"out={tmp_path / 'file.safetensors'}"])
    assert "timm.create_model('resnet18', num_classes=0, output_stride=16); RGB" in capsys.readouterr().out
    theirs = timm.create_model("resnet18", num_classes=0, output_stride=16)
    theirs.load_state_dict(load_file(tmp_path / "file.safetensors"))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.eval()(x), net(x))


@pytest.mark.parametrize("form", ["timm", "torchvision", "detectron2", "safetensors"])
def test_what_cannot_be_written_is_one_sentence(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, place = exported(tmp_path / "net", "resnet18")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit):
        cli.main(["export", f"backbone={place}", f"format={form}", f"out={tmp_path / 'file'}"])
    told = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in told
    assert told.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != place]


def test_another_backbone_is_never_taken_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path inside a run, or in the folder of one, is no way to that run."""
    _, place = exported(tmp_path / "net", "resnet18")
    for wrong in (place / "typo", place / "typo.pth", place / "checkpoints" / "last.ckpt"):
        with pytest.raises(UserError, match=r"There is no folder '.*' with a backbone in it"):
            selfsight.load(wrong)
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match="There is no folder 'nope' with a backbone in it"):
        start_from(create("resnet18"), "nope")
    with pytest.raises(UserError, match=r"Did you mean '.*/net'\?"):
        selfsight.load(tmp_path / "nett")
    for right in (place, place / "backbone.json", place / "backbone.safetensors"):
        assert selfsight.load(right).spec["image_size"] == 32  # type: ignore[index]
