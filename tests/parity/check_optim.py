"""Optimisers: whole trajectories from recorded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from selfsight.optim import LAMB, LARC, LARS, l2_penalty, outside_batchnorm
from selfsight.optim.groups import layer_decayed, layer_ids, split_no_decay

from .check_schedule import spark_recipe
from .harness import Case, family


class Named(nn.Module):
    """Parameters under the given names (dots are not allowed in PyTorch's)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def set_gradients(self, gradients: dict[str, torch.Tensor | None]) -> None:
        for name, p in self.named_parameters():
            gradient = gradients.get(name)
            p.grad = None if gradient is None else gradient.clone()


def trajectory(
    model: Named, optimizer: torch.optim.Optimizer, gradients: Iterable[dict[str, Any]], rates: Iterable[float]
) -> Iterable[dict[str, np.ndarray]]:
    """Parameters after every step."""
    for gradient, lr in zip(gradients, rates, strict=True):
        model.set_gradients(gradient)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        yield {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def steps(stacked: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: g[t] for name, g in stacked.items()} for t in range(len(next(iter(stacked.values()))))]


@family("simclrv2", "lars_")
def simclr_lars(case: Case) -> None:
    names = [k.removesuffix("__init") for k in case.inp if k.endswith("__init")]
    model = Named({n: case.tensor(f"{n}__init") for n in names})
    if case.number("use_exclusions"):
        groups = split_no_decay(model, plain_names=("sup_",))
    else:
        groups = [{"params": list(model.parameters())}]
    optimizer = LARS(
        groups,
        lr=0.0,
        momentum=case.number("momentum"),
        weight_decay=case.number("weight_decay"),
        trust_coefficient=case.number("eeta"),
        nesterov=bool(case.number("nesterov")),
        variant="classic" if case.number("classic_momentum") else "popular",
    )
    gradients = steps({n: case.tensor(f"{n}__grad") for n in names})
    parameters, momenta = [], []
    for after in trajectory(model, optimizer, gradients, case.number("lr")):
        parameters.append(after)
        momenta.append({n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()})
    for n in names:
        case.compare(f"{n}__param", np.stack([p[n] for p in parameters]), 1e-9)
        case.compare(f"{n}__momentum", torch.stack([m[n] for m in momenta]), 1e-9)


@family("simclrv2", "momentum_nesterov_")
def simclr_momentum(case: Case) -> None:
    model = Named({"w": case.tensor("init")})
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=case.number("momentum"),
        nesterov=True,
        weight_decay=case.number("weight_decay"),
    )
    got = trajectory(model, optimizer, steps({"w": case.tensor("grad")}), case.number("lr"))
    case.compare("param", np.stack([p["w"] for p in got]), 1e-5)


@family("simclrv2", "weight_decay_")
def simclr_weight_decay(case: Case) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv, proj, kernel = case.tensor("conv"), case.tensor("proj"), case.tensor("sup_kernel")
            self.conv = nn.Conv2d(conv.shape[1], conv.shape[0], conv.shape[2:], bias=False)
            self.bn = nn.BatchNorm2d(conv.shape[0])
            self.proj = nn.Linear(proj.shape[1], proj.shape[0], bias=False)
            self.classifier = nn.Linear(kernel.shape[1], kernel.shape[0])

    model = Parts().double()
    names = {"conv.weight": "conv", "bn.weight": "bn_gamma", "bn.bias": "bn_beta", "proj.weight": "proj"}
    names |= {"classifier.weight": "sup_kernel", "classifier.bias": "sup_bias"}
    model.load_state_dict({n: case.tensor(name) for n, name in names.items()}, strict=False)
    lars = case.name.removeprefix("weight_decay_").startswith("lars")
    decayed = [model.classifier.weight] if lars else outside_batchnorm(model)
    case.compare("loss_term", l2_penalty(decayed, case.number("weight_decay")), 1e-9)


@family("swav", "larc_")
def swav_larc(case: Case) -> None:
    model = Named(case.tensors("param_"))
    optimizer = LARC(
        model.parameters(),
        lr=0.0,
        momentum=case.number("momentum"),
        weight_decay=case.number("weight_decay"),
        trust_coefficient=case.number("trust_coefficient"),
        eps=case.number("eps"),
        clip=bool(case.number("clip")),
    )
    gradients = steps(case.tensors("grad_"))
    for gradient in gradients[: case.number("frozen_steps")]:
        del gradient["prototypes"]
    got = list(trajectory(model, optimizer, gradients, case.inp["lr"].tolist()))
    for n, p in model.named_parameters():
        case.compare(f"param_{n}", np.stack([after[n] for after in got]), 1e-9)
        if case.number("momentum") > 0:
            case.compare(f"momentum_{n}", optimizer.state[p]["momentum_buffer"], 1e-9)


@family("pixpro", "lars_", "sgd_default")
def pixpro_optimizer(case: Case) -> None:
    model = Named(case.tensors("p0."))
    model.get_parameter("frozen").requires_grad_(False)
    common = {"lr": 0.0, "momentum": case.number("momentum"), "weight_decay": case.number("weight_decay")}
    optimizer: torch.optim.Optimizer
    if case.number("use_lars"):
        optimizer = LARS(
            split_no_decay(model),
            trust_coefficient=case.number("trust_coef"),
            eps=case.number("eps"),
            variant="torch",
            **common,
        )
    else:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **common)
    got = list(trajectory(model, optimizer, steps(case.tensors("grad.")), case.inp["lr"].tolist()))
    for n, _ in model.named_parameters():
        case.compare(f"p.{n}", np.stack([after[n] for after in got]), 1e-12)


@family("rotation", "sgd_nesterov_")
def rotation_sgd(case: Case) -> None:
    weight = case.tensor("weight")
    model = nn.Linear(weight.shape[1], weight.shape[0]).double()
    model.load_state_dict({"weight": weight, "bias": case.tensor("bias")})
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=case.number("lr"),
        momentum=case.number("momentum"),
        weight_decay=case.number("weight_decay"),
        nesterov=bool(case.number("nesterov")),
    )
    losses = []
    for x in case.tensor("x"):
        loss = nn.functional.cross_entropy(model(x), case.tensor("labels"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    case.compare("losses", losses, 1e-9)
    case.compare("weight", model.weight, 1e-9)
    case.compare("bias", model.bias, 1e-9)


@family("spark", "lamb_")
def spark_lamb(case: Case) -> None:
    model = Named(case.tensors("p0."))
    names = [n for n, _ in model.named_parameters()]
    no_decay = [n for n in case.number("no_decay_params") if model.get_parameter(n).ndim > 1]
    groups = split_no_decay(model, plain_names=no_decay)
    switches = ("always_adapt", "bias_correction", "grad_averaging", "trust_clip")
    options = {name: bool(case.number(name)) for name in switches if name in case.hp}
    lamb = partial(
        LAMB,
        betas=tuple(case.number("betas")),
        weight_decay=case.number("wd"),
        max_grad_norm=case.number("max_grad_norm"),
        **options,
    )
    recipe, clock = spark_recipe(case, lamb)
    optimizer = recipe.build(groups, clock)
    assert isinstance(optimizer, LAMB)
    plain = next(g for g in optimizer.param_groups if g["plain"])
    adapted = next(g for g in optimizer.param_groups if not g["plain"])
    parameters = [{n: case.tensor(f"p0.{n}").numpy() for n in names}]
    rates, gradient_norms = [], []
    for t, gradient in enumerate(steps(case.tensors("g."))):
        recipe.apply(optimizer, recipe.values(t, clock))
        rates.append([adapted["lr"], adapted["weight_decay"], plain["weight_decay"]])
        model.set_gradients(gradient)
        optimizer.step()
        parameters.append({n: p.detach().numpy().copy() for n, p in model.named_parameters()})
        gradient_norms.append(float(optimizer.gradient_norm))
    case.compare("lr_wd_wdnodecay", rates, 1e-9, scale="each")
    case.compare("global_grad_norm_before_clip", gradient_norms, 1e-9, scale="each")
    for n, p in model.named_parameters():
        case.compare(f"p.{n}", np.stack([after[n] for after in parameters]), 1e-9, scale="each")
        for moment in ("exp_avg", "exp_avg_sq"):
            case.compare(f"{moment}.{n}", optimizer.state[p][moment], 1e-9, scale="each")


@family("spark", "ftlayerdecay_")
def spark_layer_decay(case: Case) -> None:
    with torch.device("meta"):
        model = timm.create_model(case.name.removeprefix("ftlayerdecay_"), num_classes=1000)
    ours = [timm_name(n) for n in case.inp["names"].tolist()]
    ids, head = layer_ids(n for n, _ in model.named_parameters())
    case.compare("layer_id", [ids[n] for n in ours], 0)
    case.compare("scale_exp", [head - ids[n] for n in ours], 0)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = layer_decayed(model, case.number("lr_scale"), plain_names=("gamma",))
    group_of = {names[id(p)]: group for group in groups for p in group["params"]}
    case.compare("lr_mult", [group_of[n].get("lr_scale", 1.0) for n in ours], 1e-15)
    case.compare("wd_mult", [0.0 if group_of[n]["plain"] else 1.0 for n in ours], 0)


def timm_name(name: str) -> str:
    """The official names of ConvNeXt in timm's words, as far as layers can be told by them; a ResNet's agree."""
    head, _, rest = name.partition(".")
    if head == "downsample_layers":
        stage, _, rest = rest.partition(".")
        return f"stem.{rest}" if stage == "0" else f"stages.{stage}.downsample.{rest}"
    if head == "stages":
        stage, block, rest = rest.split(".", 2)
        for official, timm_part in (("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
            rest = rest.replace(official, timm_part)
        return f"stages.{stage}.blocks.{block}.{rest}"
    return {"norm": f"head.norm.{rest}", "head": f"head.fc.{rest}"}.get(head, name)
