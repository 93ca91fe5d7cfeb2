"""Backbones: the contract every network keeps, small-image stems, SimCLR's family, and the way out and back in."""

from __future__ import annotations

import copy
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
from selfsight.backbones.families import FAMILIES
from selfsight.backbones.interface import check_sizes, feature_map, freeze_beyond_the_map, to_map, wrap
from selfsight.backbones.registry import create
from selfsight.backbones.replknet import LargeKernel
from selfsight.backbones.simclr_resnet import SamePool, ShortcutPool
from selfsight.checkpoints.export import export_backbone, export_onnx, timm_options, to_timm, to_torchvision
from selfsight.checkpoints.load import start_from
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.evaluation.features import staged
from selfsight.methods.spark import SparK
from selfsight.nn.multicrop import multi_crop

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


SPEC = {"backbone": {"name": "resnet10_slim", "stem": "cifar", "width": 8}, "image_size": 16}


def trained() -> nn.Module:
    net = create("resnet10_slim", stem="cifar", width=8).to(memory_format=torch.channels_last)
    net(torch.randn(4, 3, 16, 16))  # moves the running statistics
    return net


@pytest.mark.slow
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
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1  # one bit of the last tensor
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is not what was written there .* copy or export it again"):
        selfsight.load(tmp_path)
    description.write_text(json.dumps({k: v for k, v in json.loads(description.read_text()).items() if k != "sha256"}))
    selfsight.load(tmp_path)  # as folders of before the checksum are
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


@pytest.mark.slow
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


# --- transformers ----------------------------------------------------------------------------------------------------

VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, {"depth": 2}),
        (VIT, {"depth": 2, "pool": "avg", "fc_norm": False}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 2, "image_size": 56, "patch_size": 8}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_dinov3_qkvb", {"depth": 2}),
        ("xcit_nano_12_p8_224", {"depth": 2}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "image_size": 64}),
    ],
)
def test_maps_are_those_of_timm_whatever_the_layout(name: str, options: dict[str, Any]) -> None:
    """Compared with timm's own way to maps, on images that are wider than high: rows and columns are not exchanged."""
    net = create(name, **options).eval()
    x = torch.randn(2, 3, 64, 128)
    theirs = net.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]
    ours = feature_map(net, x)
    assert ours.shape[1] == net.num_features
    assert ours.shape[3] == 2 * ours.shape[2]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "convit_tiny", "beit_base_patch16_224", "vit_srelpos_small_patch16_224"]
)
def test_tokens_that_stand_for_no_place_are_left_out(name: str) -> None:
    with torch.device("meta"):
        net = create(name, image_size=64).eval()
        assert feature_map(net, torch.empty(2, 3, 64, 64)).shape == (2, net.num_features, 4, 4)


def test_layouts_are_told_apart_where_the_sizes_are_equal() -> None:
    """As many channels as rows and columns: Swin's first stage, channels last, and a convolution's."""
    x = torch.randn(1, 96, 96, 96)
    with torch.device("meta"):
        swin, convolutional = create("swin_tiny_patch4_window7_224"), create("convnext_tiny")
    assert torch.equal(to_map(swin, x, (384, 384), "layers.0"), x.permute(0, 3, 1, 2))
    assert torch.equal(to_map(convolutional, x, (384, 384), "stages.0"), x)


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "coat_tiny"])
def test_networks_without_a_map_say_so(name: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"gives no feature map.* and not \[B, D, h, w\]"):
        feature_map(create(name).eval(), torch.empty(1, 3, 224, 224))


def test_stages_of_transformers() -> None:
    """A stage is the mean of its patches, and the stages side by side are in their order."""
    net, x = create(VIT, image_size=32, patch_size=8, depth=3).eval(), torch.randn(2, 3, 32, 32)
    seen = {}
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _m, _i, tokens, i=i: seen.update({i: tokens}))
    with staged(net, ["blocks.0", "last2", "final"]) as outputs:
        found = outputs(x)
    torch.testing.assert_close(found["blocks.0"], seen[0][:, 1:].mean(1))
    torch.testing.assert_close(found["last2"], torch.cat([seen[1][:, 1:].mean(1), seen[2][:, 1:].mean(1)], 1))
    torch.testing.assert_close(found["final"], net.norm(seen[2])[:, 0].detach())
    with staged(net, ["blocks.1", "final"], maps=True) as outputs:
        found = outputs(x)
    torch.testing.assert_close(found["blocks.1"], seen[1][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    assert found["final"].shape == (2, 192, 4, 4)


def test_images_of_other_sizes() -> None:
    """At its own size a network is timm's, at others its positions are resized as timm does it, crop by crop."""
    theirs = timm.create_model(VIT, num_classes=0, depth=2).eval()
    net = create(VIT, depth=2).eval()
    net.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(net(x), theirs(x), rtol=0, atol=1e-6)
    crops = [torch.randn(2, 3, side, side) for side in (96, 96, 32)]
    features = multi_crop(net, crops)
    torch.testing.assert_close(features[2:4], net(crops[1]))
    theirs.set_input_size(img_size=(96, 96))
    torch.testing.assert_close(features[:2], theirs(crops[0]))
    small = create(VIT, image_size=32, patch_size=4, depth=1)
    assert small.pos_embed.shape == (1, 65, 192)


@pytest.mark.parametrize(
    ("name", "image_size", "sizes", "words"),
    [
        (VIT, 32, [32, 24], "24 x 24 pixels do not divide into the patches of 16 x 16.*backbone.patch_size"),
        ("convit_tiny", 32, [32, 16], "takes images of 32 x 32 pixels and the views have sides of 16 and 32"),
        ("efficientformer_l1", 64, [64], "takes images of 224 x 224 pixels and not of 64 x 64.*image_size=224"),
        ("inception_v4", 32, [32], "shrink to nothing inside this backbone"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name: str, image_size: int, sizes: list[int], words: str) -> None:
    with torch.device("meta"):
        net = create(name, image_size=image_size)
    with pytest.raises(UserError, match=words) as told:
        check_sizes(net, sizes)
    assert "\n" not in str(told.value)


def test_the_feature_is_a_token_or_a_mean() -> None:
    x = torch.randn(2, 3, 32, 32)
    token = create(VIT, image_size=32, patch_size=8, depth=1, pool="token").eval()
    torch.testing.assert_close(token(x), token.forward_features(x)[:, 0])
    mean = create(VIT, image_size=32, patch_size=8, depth=1, pool="avg").eval()
    torch.testing.assert_close(mean(x), mean.fc_norm(mean.forward_features(x)[:, 1:].mean(1)))
    for arguments, words in (
        ({"name": "resnet18", "pool": "token"}, "cannot be built.*token"),
        ({"name": VIT, "pool": "avgg"}, "Did you mean 'avg'"),
        ({"name": "wrn_28_2", "pool": "token"}, "no option 'global_pool'"),
        ({"name": "resnet18", "patch_size": 4}, "patch_size"),
    ):
        with pytest.raises(UserError, match=words):
            create(**arguments)


def test_a_frozen_patch_projection_stays() -> None:
    net = create(VIT, image_size=32, patch_size=8, depth=1, freeze_patch_embed=True)
    before = net.patch_embed.proj.weight.clone()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(net.patch_embed.proj.weight, before)
    assert net.pos_embed.grad is not None
    with pytest.raises(UserError, match="has no patch projection"):
        create("resnet18", freeze_patch_embed=True)


def test_positions_that_stay_can_learn() -> None:
    small = {"image_size": 32, "patch_size": 8, "depth": 1}
    fixed, learnt = (create("vit_tiny_mae", learn_positions=learn, **small) for learn in (False, True))
    assert torch.equal(fixed.pos_embed, learnt.pos_embed)
    assert (fixed.pos_embed.requires_grad, learnt.pos_embed.requires_grad) == (False, True)
    with pytest.raises(UserError, match="has no position embedding to learn"):
        create("resnet18", learn_positions=True)


def test_stochastic_depth_grows_from_block_to_block() -> None:
    net = create(VIT, image_size=32, patch_size=8, depth=5, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_what_no_map_depends_on_is_frozen_in_transformers() -> None:
    """The norm of a mean comes after the map."""
    net = create(VIT, image_size=32, patch_size=8, depth=2, pool="avg", in_chans=1)
    freeze_beyond_the_map(net)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"fc_norm.weight", "fc_norm.bias"}
    feature_map(net, torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name", [VIT, "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224", "coatnet_pico_rw_224"]
)
def test_spark_sends_transformers_to_mae(name: str) -> None:
    with pytest.raises(UserError, match="MAE"):
        SparK(create(name, image_size=56 if "dino" in name else 64))


def test_weights_move_between_image_sizes(tmp_path: Path) -> None:
    """A backbone trained at 32 pixels begins a run at 64 with its table of positions resized as timm does it."""
    arguments: dict[str, Any] = {"name": VIT, "patch_size": 8, "depth": 1}
    small = create(**arguments, image_size=32)
    export_backbone(small, {"backbone": {**arguments, "image_size": 32}}, tmp_path)
    large = start_from(create(**arguments, image_size=64), tmp_path).eval()
    assert large.pos_embed.shape[1] == 65
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(large(x), small.eval()(x))  # which resizes them at each step
    arguments = {"name": "convit_tiny", "patch_size": 8}
    export_backbone(create(**arguments, image_size=32), {"backbone": {**arguments, "image_size": 32}}, tmp_path)
    with pytest.raises(UserError, match=r"trained on images of 32 x 32.*cannot be changed to 64 x 64"):
        start_from(create(**arguments, image_size=64), tmp_path)


def test_transformers_out_and_back_in(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"name": VIT, "image_size": 32, "patch_size": 4, "depth": 1, "pool": "avg"}
    net = create(**arguments).eval()
    export_backbone(net, {"backbone": arguments, "image_size": 32}, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(selfsight.load(tmp_path)(x), net(x))
    twin = timm.create_model(VIT, num_classes=0, **timm_options(net))
    twin.load_state_dict(to_timm(net), strict=True)
    torch.testing.assert_close(twin.eval()(x), net(x))


# --- a person's own --------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Somebody's network: two convolutions, no interface, a map in the end."""

    def __init__(self, width: int = 6, pooled: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.pooled = pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return x.mean((2, 3)) if self.pooled else x


@pytest.mark.parametrize("pooled", [False, True])
def test_any_module_is_made_a_backbone(pooled: bool) -> None:
    module = Trunk(pooled=pooled)
    names, statistics = list(module.state_dict()), module.first[1].running_mean.clone()
    assert not isinstance(module, Backbone)
    net = selfsight.wrap(module, image_size=16)
    assert net is module
    assert isinstance(net, Backbone)
    assert list(net.state_dict()) == names
    assert torch.equal(module.first[1].running_mean, statistics)  # nothing was learned from the trial
    assert net.num_features == 12
    stages = {"first": (6, 2), "second": (12, 4)}
    assert {entry["module"]: (entry["num_chs"], entry["reduction"]) for entry in net.feature_info} == stages
    x = torch.randn(2, 3, 16, 16)
    net.eval()
    expected = module.second(module.first(x)).mean((2, 3))
    torch.testing.assert_close(net(x), expected)
    if not pooled:
        torch.testing.assert_close(feature_map(net, x).mean((2, 3)), expected)


def test_copies_of_an_own_network_are_their_own() -> None:
    """An average of the network must not read its maps through the original's weights."""
    net = wrap(Trunk(), image_size=16).eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.second.weight.zero_()
        twin.second.bias.fill_(1.0)
    x = torch.randn(2, 3, 16, 16)
    assert bool((feature_map(twin, x) == 1).all())
    assert not bool((feature_map(net, x) == 1).any())


class Pair(Trunk):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Fails(Trunk):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it rains")


def test_own_networks_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match="Pair gives a tuple"):
        wrap(Pair())
    with pytest.raises(UserError, match=r"16 x 16 pixels make it fail.*it rains"):
        wrap(Fails(), image_size=16)
    with pytest.raises(UserError, match="gives 12 features, and num_features says 13"):
        wrap(Trunk(), num_features=13)
    with pytest.raises(UserError, match=r"is a torch.nn.Module, and a int was given"):
        wrap(3)  # type: ignore[arg-type]


def test_own_networks_are_described_by_what_makes_them(tmp_path: Path) -> None:
    target = f"{Trunk.__module__}.Trunk"
    net = wrap(Trunk(width=4), image_size=16).eval()
    export_backbone(net, {"backbone": {"_target_": target, "width": 4}, "image_size": 16}, tmp_path)
    back, x = selfsight.load(tmp_path, trust=True), torch.randn(2, 3, 16, 16)
    assert isinstance(back, Trunk)
    torch.testing.assert_close(back(x), net(x))
    description = json.loads((tmp_path / "backbone.json").read_text())
    for other, words in (("nowhere.Net", "nowhere.Net.*has to be importable"), (f"{target}s", "cannot be made here")):
        description["backbone"]["_target_"] = other
        (tmp_path / "backbone.json").write_text(json.dumps(description))
        with pytest.raises(UserError, match=words):
            selfsight.load(tmp_path, trust=True)


# --- families, and networks that timm lacks --------------------------------------------------------------------------


@pytest.mark.slow
def test_every_network_belongs_to_a_family() -> None:
    members = {name for family in FAMILIES for name in family.members()}
    assert members == {name for name in [*timm.list_models(), *registry.choices()] if not name.startswith("test_")}
    assert all(family.smallest in family.members() for family in FAMILIES)


def transformer_layer(dim: int, hidden: int, *, qkv_bias: bool) -> int:
    attention = 3 * dim * dim + 3 * dim * qkv_bias + dim * dim + dim
    return attention + 2 * dim * hidden + hidden + dim + 4 * dim


@pytest.mark.parametrize(
    ("name", "depth", "dim", "ratio", "kernel", "convs", "classes", "side", "millions"),
    [
        ("cct_2_3x2", 2, 128, 1, 3, 2, 10, 8, 0.28),
        ("cct_7_3x1", 7, 256, 2, 3, 1, 10, 16, 3.76),
        ("cct_7_3x2", 7, 256, 2, 3, 2, 10, 8, 3.85),
        ("cct_14_7x2", 14, 384, 3, 7, 2, 1000, 14, 22.36),
    ],
)
def test_sizes_of_cct(
    name: str, depth: int, dim: int, ratio: int, kernel: int, convs: int, classes: int, side: int, millions: float
) -> None:
    """The paper's numbers of parameters, and the same counted by hand."""
    assert registry.is_known(name)
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=classes)
    tokeniser = {1: 3 * dim, 2: 3 * 64 + 64 * dim}[convs] * kernel**2
    counted = tokeniser + side**2 * dim + depth * transformer_layer(dim, ratio * dim, qkv_bias=False)
    counted += 2 * dim + dim + 1 + (dim + 1) * classes  # norm, pooling, classifier
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == counted
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(("name", "depths", "millions"), [("cvt_13", (1, 2, 10), 20), ("cvt_21", (1, 4, 16), 32)])
def test_sizes_of_cvt(name: str, depths: tuple[int, ...], millions: int) -> None:
    """Millions as the paper rounds them; counted by hand, each projection adds a depthwise kernel and a norm."""
    assert registry.is_known(name)
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=1000)
    counted, before = 0, 3
    for depth, dim, kernel in zip(depths, (64, 192, 384), (7, 3, 3), strict=True):
        counted += before * dim * kernel**2 + dim + 2 * dim
        counted += depth * (transformer_layer(dim, 4 * dim, qkv_bias=True) + 3 * (9 * dim + 2 * dim))
        before = dim
    counted += 384 + 2 * 384 + 385 * 1000  # class token, norm, classifier
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == counted
    assert round(parameters / 1e6) == millions


@pytest.mark.parametrize(("name", "width", "millions"), [("replknet_31b", 128, 79), ("replknet_31l", 192, 172)])
def test_sizes_of_replknet(name: str, width: int, millions: int) -> None:
    """Millions as the paper cuts them, and the same counted by hand."""
    assert registry.is_known(name)
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=1000)
    counted = (27 + 9 + width + 9) * width + 4 * 2 * width
    for i, (depth, kernel) in enumerate(zip((2, 2, 18, 2), (31, 29, 27, 13), strict=True)):
        wide = width * 2**i
        large = 2 * wide + 2 * (wide * wide + 2 * wide) + wide * (kernel**2 + 25) + 4 * wide
        feed_forward = 2 * wide + 8 * wide * wide + 8 * wide + 2 * wide
        counted += depth * (large + feed_forward)
        if i:
            counted += wide // 2 * wide + 2 * wide + 9 * wide + 2 * wide
    counted += 2 * wide + (wide + 1) * 1000
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == counted
    assert int(parameters / 1e6) == millions


def test_the_large_kernel_sees_far() -> None:
    """In one block of RepLKNet a pixel moves the place fifteen cells away, and none sixteen away."""
    torch.manual_seed(0)
    block = LargeKernel(4, 31, 0.0).eval().double()
    x = torch.rand(1, 4, 40, 40, dtype=torch.float64)
    moved = x.clone()
    moved[0, :, 20, 20] = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    changed = (block(moved) - block(x)).abs().sum(dim=1)[0] > 0
    assert bool(changed[20, 5:36].any())
    assert bool(changed[20, 5] | changed[20, 35] | changed[5, 20] | changed[35, 20])
    assert not bool(changed[:, :5].any() | changed[:, 36:].any())


def test_compact_transformers_take_other_sizes() -> None:
    """A table of positions that is the same everywhere stays so when it is resized."""
    net = create("cct_2_3x2", image_size=32).eval()
    assert net.pos_embed.shape[1] == 64
    twin = create("cct_2_3x2", image_size=16).eval()
    weights = {name: value for name, value in net.state_dict().items() if name != "pos_embed"}
    twin.load_state_dict({**weights, "pos_embed": torch.full((1, 16, 128), 0.5)})
    with torch.no_grad():
        net.pos_embed.fill_(0.5)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(net(x), twin(x))
