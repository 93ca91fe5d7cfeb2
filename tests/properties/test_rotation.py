"""What rotation prediction, its networks and its probes have to do whatever the numbers are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsight.backbones.registry import create
from selfsight.checkpoints.rotation import from_official
from selfsight.errors import UserError
from selfsight.losses.rotation import rotation_loss, rotation_loss_per_image
from selfsight.methods.rotation import Rotation
from selfsight.nn.probes import AlexNetClassifier, ConvClassifier, LinearClassifier, MultLayerClassifier
from selfsight.nn.rotate import rotate4

from ..small import SmallNet, assert_resumes, batches, prepare, train

SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4)


def method(backbone: nn.Module | None = None, **options: Any) -> Rotation:
    return Rotation(backbone or SmallNet(), **({"hidden_dims": [], "map_side": None, "decay": "all"} | options))


# --- task ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_images_of_the_mean_over_angles() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 4, generator=g, dtype=torch.float64), torch.arange(4).repeat(3)
    log_p = logits.log_softmax(1)
    by_hand = [-sum(float(log_p[4 * b + k, k]) for k in range(4)) / 4 for b in range(3)]
    assert rotation_loss_per_image(logits, labels).tolist() == pytest.approx(by_hand)
    assert float(rotation_loss(logits, labels)) == pytest.approx(sum(by_hand) / 3)
    order = torch.randperm(12, generator=g)
    torch.testing.assert_close(rotation_loss(logits[order], labels[order]), rotation_loss(logits, labels))
    assert rotation_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_four_copies_of_each_image_and_no_interpolation() -> None:
    (batch,) = batches([9], 3, 1)
    x, y = rotate4(batch.views[0])
    assert y.tolist() == [0, 1, 2, 3] * 3
    for b, image in enumerate(batch.views[0]):
        for k in range(4):
            copy = x[4 * b + k]
            assert torch.equal(copy.flatten(1).sort().values, image.flatten(1).sort().values)
            for _ in range(k):  # turned back clockwise: the first column becomes the first row, read upwards
                copy = copy.flip(-2).transpose(-1, -2)
            assert torch.equal(copy, image)


def test_turning_the_images_turns_the_answers() -> None:
    """The loss of images that already lie on their side is that with the labels shifted by one."""
    torch.manual_seed(0)
    made = method().eval()
    (batch,) = batches([16], 4, 1)
    x, y = rotate4(batch.views[0])
    lying = torch.rot90(batch.views[0], 1, (-2, -1))
    expected = rotation_loss(made.logits(x), (y - 1) % 4)
    batch.views[0] = lying
    torch.testing.assert_close(made.training_step(batch, 0)["loss"], expected)


def test_an_untrained_head_is_at_chance() -> None:
    made = method()
    nn.init.zeros_(made.head[-1].weight)
    nn.init.zeros_(made.head[-1].bias)
    (batch,) = batches([16], 4, 1)
    result = made.training_step(batch, 0)
    assert float(result["loss"].detach()) == pytest.approx(math.log(4)) == pytest.approx(made.chance_loss())
    assert float(result["rotation_accuracy"]) == 0.25


def test_oblong_images_are_refused() -> None:
    (batch,) = batches([16], 2, 1)
    batch.views[0] = batch.views[0][..., :12]
    with pytest.raises(UserError, match="16x12"):
        method().training_step(batch, 0)


def test_it_learns_which_way_up_a_gradient_is() -> None:
    """Images that are bright at the top; a flip of left and right keeps the answer."""
    torch.manual_seed(0)
    data = batches([16], 8, 2)
    for batch in data:
        batch.views[0] = torch.linspace(1, -1, 16)[:, None] + 0.1 * batch.views[0]
    made = prepare(method(), SGD, 0.1, 2, 10)
    found = train(made, made.configure_optimizers(), data, range(20))
    assert float(found[-1]["rotation_accuracy"]) == 1
    assert float(found[-1]["loss"]) < 0.3


def test_resumed_run_equals_an_uninterrupted_one() -> None:
    assert_resumes(lambda: prepare(method(hidden_dims=[6]), SGD, 0.1, 3, 3), batches([16], 4, 3), 4, 8)


def test_groups() -> None:
    assert len(method().param_groups()) == 1
    assert [group["plain"] for group in method(decay="kernels").param_groups()] == [False, True]


# --- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("nin3", 20), ("nin4", 20), ("nin5", 20), ("alexnet_rotnet", 64)])
def test_networks_have_timms_interface(name: str, size: int) -> None:
    torch.manual_seed(0)
    net = create(name, in_chans=1).eval()
    x = torch.randn(2, 1, size, size)
    features = net.forward_features(x)
    assert features.shape[1] == net.num_features
    torch.testing.assert_close(net(x), features.mean((2, 3)))
    info, seen = net.feature_info, []
    for stage in info:
        net.get_submodule(stage["module"]).register_forward_hook(lambda _, __, out: seen.append(out.shape))
    net(x)
    assert [shape[1] for shape in seen] == [stage["num_chs"] for stage in info]
    for shape, stage in zip(seen, info, strict=True):
        assert abs(size / stage["reduction"] - shape[-1]) < 1.5
    net.reset_classifier(7)
    assert net(x).shape == (2, 7)
    assert net.forward_head(features, pre_logits=True).shape == (2, net.num_features)


def test_sizes_are_those_of_the_authors() -> None:
    def parameters(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    assert parameters(create("nin3")) + 192 * 10 + 10 == 1_005_642
    assert parameters(method(create("nin4"))) == 1_411_140
    assert parameters(method(create("nin5"))) == 1_817_796
    with torch.device("meta"):
        alexnet = method(create("alexnet_rotnet"), hidden_dims=[4096, 4096], map_side=6)
        assert parameters(alexnet) == 57_030_724
        assert parameters(MultLayerClassifier(192, 10, side=8)) == 2_500_410
        assert parameters(ConvClassifier(192, 10)) == 408_586


def test_the_third_block_pools_only_when_asked_to() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert create("nin4").forward_features(x).shape[-1] == 8
    pooled = create("nin4", pool_third=True)
    assert pooled.forward_features(x).shape[-1] == 4
    assert [info["reduction"] for info in pooled.feature_info] == [2, 4, 8, 8]
    assert create("nin3", pool_third=True).forward_features(x).shape[-1] == 8


def test_small_images_and_unknown_options_are_refused() -> None:
    with pytest.raises(UserError, match="at least 63"):
        create("alexnet_rotnet")(torch.zeros(1, 3, 62, 80))
    assert create("alexnet_rotnet")(torch.zeros(1, 3, 63, 63)).shape == (1, 256)
    with pytest.raises(UserError, match="no option 'drop_path_rate'"):
        create("nin4", drop_path=0.1)
    with pytest.raises(UserError, match="pretrained"):
        create("nin4", pretrained=True)


def test_alexnets_head_sees_the_whole_map() -> None:
    torch.manual_seed(0)
    made = method(hidden_dims=[6], map_side=4).eval()  # the map of 16 pixels is 4 x 4
    (batch,) = batches([16], 2, 1)
    x = batch.views[0]
    flat = made.backbone.forward_features(x).flatten(1)
    torch.testing.assert_close(made.logits(x), made.head(flat))
    assert made.head[0].bias is None
    assert isinstance(made.head[1], nn.BatchNorm1d)


# --- probes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "fan_out"),
    [
        (LinearClassifier(16, 50, side=5), {50}),
        (ConvClassifier(64, 10, width=48), {9 * 48, 48, 10}),
        (MultLayerClassifier(8, 10, side=4), {200, 10}),
        (AlexNetClassifier(4, 10, side=13, conv=True, hidden=64), {9 * 256, 64, 10}),
    ],
)
def test_probes_start_with_variance_two_over_fan_out(probe: nn.Module, fan_out: set[int]) -> None:
    found = set()
    for layer in probe.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan = layer.weight[:, 0].numel()
            found.add(fan)
            assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.1)
            assert layer.bias is None or not layer.bias.any()
    assert found == fan_out


def test_the_linear_probe_is_linear_in_pooled_features() -> None:
    torch.manual_seed(0)
    probe = LinearClassifier(3, 4, side=2).eval()
    x = torch.rand(5, 3, 6, 6)
    assert probe.features(x).shape == (5, 12)
    torch.testing.assert_close(probe(x), F.linear(probe.features(x), probe.linear.weight, probe.linear.bias))
    moved = torch.zeros_like(x)
    for i in range(2):
        for j in range(2):  # only the largest value of each quarter counts
            moved[..., 3 * i, 3 * j] = x[..., 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].amax((-2, -1))
    torch.testing.assert_close(probe(moved), probe(x))


def test_probes_take_any_map() -> None:
    x = torch.randn(4, 8, 13, 13)
    for conv in (False, True):
        assert AlexNetClassifier(8, 5, side=13, conv=conv, hidden=16)(x).shape == (4, 5)
    assert MultLayerClassifier(8, 5, side=13)(x).shape == (4, 5)
    assert ConvClassifier(8, 5, width=6)(x).shape == (4, 5)
    assert MultLayerClassifier(8, 200, side=1)[1][0].out_features == 2048


# --- authors' checkpoints ------------------------------------------------------------------------------------------


def nins_names(stages: int) -> list[str]:
    layers = ["Conv.weight", *(f"BatchNorm.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
    blocks = [
        f"_feature_blocks.{b}.Block{b + 1}_ConvB{i}.layers.{layer}"
        for b in range(stages)
        for i in (1, 2, 3)
        for layer in layers
    ]
    return [*blocks, *(f"_feature_blocks.{stages}.Classifier.{n}" for n in ("weight", "bias"))]


def alexnets_names() -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var"]
    names = [f"{b}.{n}" for b in (0, 2, 4, 5, 6) for n in ["0.weight", "0.bias", *(f"1.{n}" for n in norm)]]
    names += [f"8.{n}" for k in (1, 4) for n in [f"{k}.weight", *(f"{k + 1}.{n}" for n in norm)]]
    return [f"_feature_blocks.{name}" for name in [*names, "9.0.weight", "9.0.bias"]]


@pytest.mark.parametrize("source", ["nin4", "alexnet_rotnet", "vissl"])
def test_authors_names_are_understood(source: str) -> None:
    nin = source == "nin4"
    with torch.device("meta"):
        made = method(create("nin4")) if nin else method(create("alexnet_rotnet"), hidden_dims=[4096] * 2, map_side=6)
    ours = {name: value for name, value in made.state_dict().items() if "num_batches" not in name}
    names = nins_names(4) if nin else alexnets_names()
    theirs = dict(zip(names, ours.values(), strict=True))  # both in the order of the layers
    checkpoint = {"epoch": 200, "network": theirs}
    if source == "vissl":
        checkpoint = {"model_state_dict": {f"trunk.base_model.{name}": value for name, value in theirs.items()}}
    found = from_official(checkpoint)
    assert found.keys() == made.state_dict().keys()
    assert all(found[name] is value for name, value in ours.items())
    with pytest.raises(UserError, match="no checkpoint of gidariss"):
        from_official({"network": {"conv1.weight": torch.ones(1)}})
