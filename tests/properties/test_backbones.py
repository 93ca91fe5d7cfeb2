"""Backbones: the contract every network keeps, small-image stems, SimCLR's family, and the way out and back in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

import selfsight
from selfsight.backbones import registry
from selfsight.backbones.registry import create
from selfsight.backbones.simclr_resnet import SamePool, ShortcutPool
from selfsight.checkpoints.export import export_backbone, export_onnx, to_timm, to_torchvision
from selfsight.errors import UserError

CONFIGURATIONS = sorted((Path(__file__).parents[2] / "conf" / "backbone").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"stem": "cifar"}),
        ("resnet10_slim", {"stem": "cifar"}),
        ("simclr_resnet18", {"stem": "cifar"}),
        ("simclr_resnet50", {"sk_ratio": 0.0625}),
        ("seresnet50", {"stem": "cifar"}),
        ("convnext_atto", {"drop_path": 0.1}),
        ("efficientnet_b0", {}),
        ("mobilenetv3_small_050", {}),  # these two have layers between their last map and the classifier
        ("vgg11", {}),
    ],
)
def test_sizes_are_what_the_registry_says(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = create(name, **options).eval()
        x = torch.empty(2, 3, 64, 64)
    maps: dict[str, torch.Tensor] = {}
    for info in net.feature_info:
        module = net.get_submodule(info["module"])
        if info.get("hook_type") == "forward_pre":
            module.register_forward_pre_hook(lambda _m, i, key=info["module"]: maps.update({key: i[0]}))
        else:
            module.register_forward_hook(lambda _m, _i, y, key=info["module"]: maps.update({key: y}))
    last = net.forward_features(x)
    for info in net.feature_info:
        side = 64 // info["reduction"]
        assert maps[info["module"]].shape == (2, info["num_chs"], side, side), info
    assert last.shape[:2] == (2, net.num_features)
    assert net(x).shape == (2, net.num_features)


@pytest.mark.parametrize("name", ["resnet18", "simclr_resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_the_output_is_the_mean_of_the_last_map(name: str) -> None:
    net, x = create(name).eval(), torch.randn(2, 3, 64, 64)
    pooled = net.forward_features(x).mean((2, 3))
    if hasattr(getattr(net, "head", None), "norm"):
        pooled = net.head.norm(pooled[:, :, None, None]).flatten(1)  # ConvNeXt normalises after pooling
    torch.testing.assert_close(net(x), pooled)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet10_slim", "simclr_resnet18", "wide_resnet50_2"])
def test_the_cifar_stem(name: str) -> None:
    with torch.device("meta"):
        small, large = create(name, stem="cifar", in_chans=1), create(name)
    stem = small.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert stem.weight.shape[:2] == (small.feature_info[0]["num_chs"], 1)
    assert isinstance(small.maxpool, nn.Identity)
    assert [i["reduction"] for i in small.feature_info] == [1, 1, 2, 4, 8]
    assert [i["reduction"] for i in large.feature_info] == [2, 4, 8, 16, 32]
    rest = [{k for k in net.state_dict() if not k.startswith("conv1.")} for net in (small, large)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnt50"}, "no backbone 'resnt50'.*Did you mean 'resnet50'"),
        ({"name": "simclr_resnet51"}, "Did you mean 'simclr_resnet5?0"),
        ({"name": "convnext_atto", "stem": "cifar"}, "'convnext_atto' has no stem for small images"),
        ({"name": "resnet18", "stem": "cifr"}, "Did you mean 'cifar'"),
        ({"name": "vgg11", "drop_path": 0.1}, "drop_path_rate"),
        ({"name": "resnet18", "wdth": 2}, "wdth"),
        ({"name": "simclr_resnet18", "sk_ratio": 0.0625}, "need bottlenecks"),
        ({"name": "simclr_resnet18", "pretrained": True}, "not to be had"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        create(**arguments)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_build(path: Path) -> None:
    configuration = yaml.safe_load(path.read_text())
    target = configuration.pop("_target_")
    configuration = {key: 16 if value == "${dataset.image_size}" else value for key, value in configuration.items()}
    assert target == "selfsight.backbones.registry.create"
    if configuration["name"] == "???":
        return
    assert registry.is_known(configuration["name"])
    with torch.device("meta"):
        net = create(**configuration)
    words = path.read_text().splitlines()[0]
    if "million parameters" in words:
        stated = float(words.split(" million parameters")[0].split()[-1])
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(stated, abs=0.06)


def test_ours_are_listed() -> None:
    assert {"simclr_resnet50", "resnet10_slim"} <= set(registry.choices())
    assert all(registry.is_known(name) for name in [*registry.choices(), "resnet50", "resnet50.a1_in1k"])
    assert not registry.is_known("resnet5000")


@pytest.mark.parametrize(
    ("depth", "width", "sk_ratio", "millions"),
    [
        (50, 1, 0, 23.51), (50, 1, 0.0625, 35.22), (50, 2, 0, 93.91), (50, 2, 0.0625, 140.31),
        (101, 1, 0, 42.50), (101, 1, 0.0625, 64.66), (152, 2, 0, 232.25), (152, 3, 0.0625, 794.70),
    ],
)  # fmt: skip
def test_sizes_of_the_published_family(depth: int, width: int, sk_ratio: float, millions: float) -> None:
    with torch.device("meta"):
        net = create(f"simclr_resnet{depth}", width=width, sk_ratio=sk_ratio)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert net.num_features == 2048 * width


def test_simclr_networks_start_as_the_authors_do() -> None:
    torch.manual_seed(0)
    net = create("simclr_resnet18", stem="cifar")
    weight = net.layer4[0].conv2.weight
    fan_in = weight[0].numel()
    assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.01)
    assert weight.abs().max().item() <= 2 * fan_in**-0.5 / 0.8796
    silent = [n for n, p in net.named_parameters() if "bn" in n and n.endswith("weight") and not p.any()]
    assert silent == [f"layer{i}.{j}.bn2.weight" for i in range(1, 5) for j in range(2)]
    assert all(f"layer{i}.0.downsample.0.weight" in net.state_dict() for i in range(1, 5))


@pytest.mark.parametrize("size", [(6, 7), (5, 4), (1, 2), (9, 9)])
def test_pools_pad_as_tensorflow_does(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)

    def same(n: int, kernel: int, stride: int) -> tuple[int, int]:
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        return total // 2, total - total // 2

    h, w = size
    padded = F.pad(x, (*same(w, 3, 2), *same(h, 3, 2)))
    torch.testing.assert_close(SamePool()(x), F.max_pool2d(padded, 3, 2))
    after, ones = F.pad(x, (0, 1, 0, 1)), F.pad(torch.ones_like(x), (0, 1, 0, 1))
    torch.testing.assert_close(ShortcutPool(1)(x), F.avg_pool2d(after, 2, 1) / F.avg_pool2d(ones, 2, 1))
    torch.testing.assert_close(ShortcutPool(2)(x), F.avg_pool2d(after, 2, 2))


SPEC = {"backbone": {"_target_": "anything", "name": "resnet10_slim", "stem": "cifar", "width": 8}, "image_size": 16}


def trained() -> nn.Module:
    net = create("resnet10_slim", stem="cifar", width=8).to(memory_format=torch.channels_last)
    net(torch.randn(4, 3, 16, 16))  # moves the running statistics
    return net


def test_out_and_back_in(tmp_path: Path) -> None:
    net, x = trained(), torch.randn(2, 3, 16, 16)
    path = export_backbone(torch.compile(net), {**SPEC, "method": "simclrv2"}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]
    for place in (tmp_path, path, str(tmp_path / "backbone.json")):
        back = selfsight.load(place)
        assert not back.training
        assert not any(p.requires_grad for p in back.parameters())
        torch.testing.assert_close(back(x), net.eval()(x), rtol=0, atol=1e-6)
    description = json.loads((tmp_path / "backbone.json").read_text())
    assert back.spec == description
    assert (description["num_features"], description["selfsight"]) == (64, selfsight.__version__)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no '.*backbone.safetensors'; a finished run"):
        selfsight.load(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has not come to its end"):
        selfsight.load(tmp_path)
    weights = export_backbone(trained(), SPEC, tmp_path)
    description = tmp_path / "backbone.json"
    for other, words in (({"width": 16}, "0 tensors are missing, 0 left over and"), ({"name": "resnet18"}, "resnet18")):
        description.write_text(json.dumps({"backbone": {**SPEC["backbone"], **other}}))
        with pytest.raises(UserError, match=words):
            selfsight.load(tmp_path)
    description.write_text('{"backbone": 3}')
    with pytest.raises(UserError, match="does not describe a backbone"):
        selfsight.load(tmp_path)
    export_backbone(trained(), SPEC, tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        selfsight.load(tmp_path)


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    export_backbone(trained(), SPEC, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        export_backbone(trained(), {**SPEC, "mean": object()}, tmp_path)
    assert (tmp_path / "backbone.json").read_bytes() == before["backbone.json"]
    assert {p.name for p in tmp_path.iterdir()} == set(before)
    with pytest.raises(UserError, match="cannot be written"):
        export_backbone(trained(), SPEC, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_torchvision_takes_our_resnets(name: str) -> None:
    net, classifier = create(name).eval(), nn.Linear(2048, 7)
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(to_torchvision(net), strict=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(theirs.eval()(x), net(x))
    if net.num_features == 2048:
        theirs.fc = nn.Linear(2048, 7)
        theirs.load_state_dict(to_torchvision(net, classifier), strict=True)
        torch.testing.assert_close(theirs.fc.weight, classifier.weight)


@pytest.mark.parametrize("name", ["simclr_resnet18", "convnext_atto", "resnet26d"])
def test_torchvision_has_no_such_network(name: str) -> None:
    with pytest.raises(UserError, match="no counterpart in torchvision"):
        to_torchvision(create(name))


def test_simclr_networks_fit_torchvision_and_timm() -> None:
    with torch.device("meta"):
        weights = create("simclr_resnet50").state_dict()
        theirs = torchvision.models.resnet50()
        twin = timm.create_model("resnet50", num_classes=0)
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in weights.items()} == expected == {k: v.shape for k, v in twin.state_dict().items()}


def test_timm_takes_our_networks() -> None:
    net, x = create("convnext_atto").eval(), torch.randn(1, 3, 64, 64)
    theirs = timm.create_model("convnext_atto", num_classes=0).eval()
    theirs.load_state_dict(to_timm(net), strict=True)
    torch.testing.assert_close(theirs(x), net(x))


def test_onnx_without_its_packages_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'selfsight\[onnx\]'"):
        export_onnx(trained(), tmp_path / "net.onnx", 16)
    assert not list(tmp_path.iterdir())
