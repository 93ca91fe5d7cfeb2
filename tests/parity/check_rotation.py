"""The numbers of RotNet's authors (gidariss/FeatureLearningRotNet): loss, networks and probes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.backbones.alexnet_rotnet import AlexNet
from selfsight.backbones.nin import NIN
from selfsight.losses.rotation import rotation_loss, rotation_loss_per_image
from selfsight.nn.nin import avg_pool, conv_unit, max_pool, nin_block
from selfsight.nn.probes import ALEXNET_POOLS, ConvClassifier, LinearClassifier, MultLayerClassifier

from .check_supcon import fill, in_order
from .harness import Case, family

TOLERANCE = 1e-9


@family("rotation", "rotation_loss")
def loss(case: Case) -> None:
    logits, labels = case.tensor("logits", requires_grad=True), case.tensor("labels")
    value = rotation_loss(logits, labels)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_logits", logits.grad, TOLERANCE)
    case.compare("loss_per_image", rotation_loss_per_image(logits, labels), TOLERANCE)
    case.compare("prec1", 100 * (logits.argmax(1) == labels).double().mean(), TOLERANCE)


def load_in_order(module: nn.Module, arrays: dict[str, Tensor]) -> None:
    """Give a module the recorded tensors, which stand in the order of the layers."""
    ours = [tensor for _, tensor in in_order(module)]
    for tensor, value in zip(ours, arrays.values(), strict=True):
        tensor.data.copy_(value)


def unit(case: Case, prefix: str) -> dict[str, Tensor]:
    names = ("Conv_weight", *(f"BatchNorm_{n}" for n in ("weight", "bias", "running_mean", "running_var")))
    return {name: case.tensor(f"{prefix}layers_{name}") for name in names}


def compare_modes(case: Case, module: nn.Module, x: Tensor) -> Tensor:
    case.compare("y_eval", module.eval()(x), TOLERANCE)
    y = module.train()(x)
    case.compare("y_train", y, TOLERANCE)
    return y


@family("rotation", "nin_basicblock")
def basic_block(case: Case) -> None:
    weights, x = unit(case, ""), case.tensor("x", requires_grad=True)
    out, channels, kernel, _ = weights["Conv_weight"].shape
    module = conv_unit(channels, out, kernel).double()
    conv, norm = module[0], module[1]
    assert kernel == case.number("kernel_size")
    assert conv.padding == (case.number("padding"),) * 2
    assert (norm.eps, norm.momentum) == (case.number("bn_eps"), case.number("bn_momentum"))
    load_in_order(module, weights)
    y = compare_modes(case, module, x)
    y.square().sum().backward()
    case.compare("grad_x_of_sum_y2", x.grad, TOLERANCE)
    case.compare("grad_conv_of_sum_y2", conv.weight.grad, TOLERANCE)
    case.compare("running_mean_after", norm.running_mean, TOLERANCE)
    case.compare("running_var_after", norm.running_var, TOLERANCE)


@family("rotation", "nin_smallblock")
def small_block(case: Case) -> None:
    units = [unit(case, f"ConvB{i}_") for i in (1, 2, 3)]
    first = units[0]["Conv_weight"]
    block = nin_block(first.shape[1], [len(u["Conv_weight"]) for u in units], first.shape[2]).double()
    load_in_order(block, {f"{i}{name}": value for i, u in enumerate(units) for name, value in u.items()})
    pool = max_pool() if case.name.startswith("nin_smallblock_max") else avg_pool()
    compare_modes(case, nn.Sequential(block, pool), case.tensor("x"))


@family("rotation", "pool_")
def pools(case: Case) -> None:
    x = case.tensor("x")
    case.compare("max_k3s2p1", max_pool()(x), TOLERANCE)
    case.compare("avg_k3s2p1", avg_pool()(x), TOLERANCE)
    case.compare("global_avg", x.mean((2, 3)), TOLERANCE)
    case.compare("alexnet_max_k3s2", AlexNet().get_submodule("pool5")(x), TOLERANCE)


def stages(backbone: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The map of every stage that ``feature_info`` names, and the network's output."""
    maps: dict[str, Tensor] = {}
    for info in backbone.feature_info:
        keep = lambda _, __, out, name=info["module"]: maps.__setitem__(name, out.detach().clone())  # noqa: E731
        backbone.get_submodule(info["module"]).register_forward_hook(keep)
    y = backbone(x)
    for info in backbone.feature_info:
        found = maps[info["module"]]
        assert found.shape[1] == info["num_chs"]
        assert abs(x.shape[-1] / found.shape[-1] / info["reduction"] - 1) < 0.1
    return maps, y


@family("rotation", "nin3_", "nin4_", "nin5_")
def network_in_network(case: Case) -> None:
    pool_third = bool(case.number("use_avg_on_conv3"))
    net = NIN(case.number("num_stages"), pool_third=pool_third, num_classes=case.number("num_classes")).double().eval()
    assert fill(net, case.number("weight_seed")) == case.number("num_tensors")
    x = case.tensor("x")
    maps, logits = stages(net, x)
    case.compare("logits", logits, TOLERANCE)
    case.compare("shapes", [m.shape[1:] for m in maps.values()], 0)
    for name, m in maps.items():
        case.compare(f"{name}_channel_mean", m.mean((2, 3)), TOLERANCE)
    if "param_count" in case.out:
        case.compare("param_count", sum(p.numel() for p in net.parameters()), 0)
        case.compare("conv2_sample0_first8", maps["conv2"][0, :8], TOLERANCE)
        case.compare("logits_train_mode", net.train()(x), TOLERANCE)


@family("rotation", "alexnet_trunk")
def alexnet(case: Case) -> None:
    net = AlexNet().double().eval()
    assert fill(net, case.number("weight_seed")) == case.number("num_tensors")
    size = case.number("input_size")
    x = np.random.RandomState(case.number("input_seed")).standard_normal((1, 3, size, size))
    maps, _ = stages(net, torch.from_numpy(x.astype(np.float32)).double())
    maps["pool5"] = net.get_submodule("pool5")(maps["conv5"])
    case.compare("shapes", [m.shape[1:] for m in maps.values()], 0)
    dims = []
    for name, m in maps.items():
        case.compare(f"{name}_channel_mean", m.mean((2, 3)), TOLERANCE)
        if name in ALEXNET_POOLS:
            probe = LinearClassifier(m.shape[1], 2, side=ALEXNET_POOLS[name]).double().eval()
            vector = probe.features(m)
            dims.append(vector.shape[1])
            case.compare(f"{name}_probe_first96", vector[:, :96], TOLERANCE)
            case.compare(f"{name}_probe_l2", vector.norm(dim=1), TOLERANCE)
    case.compare("probe_dims", dims, 0)


@family("rotation", "linear_probe_")
def linear_probe(case: Case) -> None:
    x = case.tensor("x")
    names = [f"BatchNorm_running_{n}" for n in ("mean", "var")] + [f"LiniearClassifier_{n}" for n in ("weight", "bias")]
    weights = {name: case.tensor(f"classifier_{name}") for name in names}
    classes = len(weights["LiniearClassifier_bias"])
    pool: Any = "max" if case.name.startswith("linear_probe_max") else "avg"
    probe = LinearClassifier(x.shape[1], classes, side=case.number("pool_size"), pool=pool).double()
    assert probe.norm.affine == bool(case.number("bn_affine"))
    load_in_order(probe, weights)
    compare_modes(case, probe, x)


@family("rotation", "conv_classifier")
def conv_classifier(case: Case) -> None:
    x = case.tensor("x")
    probe = ConvClassifier(x.shape[1], case.out["y_eval"].shape[1]).double()
    assert fill(probe, case.number("weight_seed")) == case.number("num_tensors")
    case.compare("y_eval", probe.eval()(x), TOLERANCE)


@family("rotation", "multlayer_classifier")
def mult_layer_classifier(case: Case) -> None:
    x = case.tensor("x")
    probe = MultLayerClassifier(x.shape[1], case.out["y_eval"].shape[1], side=x.shape[2]).double()
    assert probe[1][0].out_features == case.number("hidden_width")
    assert fill(probe, case.number("weight_seed")) == case.number("num_tensors")
    compare_modes(case, probe, x)
