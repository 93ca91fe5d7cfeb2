"""The numbers of MoCo v3's authors (facebookresearch/moco-v3)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.backbones.vision_transformer import ConvStem, MoCoViT
from selfsight.losses.mocov3 import contrast
from selfsight.methods.mocov3 import MoCoV3
from selfsight.nn.ema import EMATeacher
from selfsight.nn.positions import sincos_2d
from selfsight.optim.groups import split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Constant, Cosine, Schedule, Warmup

from .check_schedule import nested
from .harness import Case, family
from .networks import (
    NoBackbone,
    TinyNet,
    compare_state,
    gradients,
    lars_trajectory,
    of_processes,
    one_epoch_steps,
    rates_of,
    renamed,
    run_steps,
    stacked,
    tiny_vit,
    two_views,
)  # fmt: skip

TOLERANCE = 1e-9


# --- loss ------------------------------------------------------------------------------------------------------------


def losses(arrays: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    q = [arrays[name].requires_grad_() for name in ("q1", "q2")]
    k = [arrays[name].requires_grad_() for name in ("k1", "k2")]
    first, second = (contrast(q[i], k[1 - i], temperature=temperature) for i in (0, 1))
    (first + second).backward()
    assert k[0].grad is None, "keys get no gradient"
    found = {"loss_q1_k2": first, "loss_q2_k1": second, "loss": first + second}
    return {name: value.detach() for name, value in found.items()} | gradients({"q1": q[0], "q2": q[1]})


@family("mocov3", "loss_")
def loss(case: Case) -> None:
    for name, value in losses({n: case.tensor(n) for n in case.inp}, case.number("temperature")).items():
        case.compare(name, value, TOLERANCE)


def losses_on(rank: int, case: Case) -> dict[str, Tensor]:
    return losses({n: case.tensor(n)[rank].clone() for n in case.inp}, case.number("temperature"))


@family("mocov3", "loss_#rank", slow=True)
def loss_on_processes(case: Case) -> None:
    ranks = of_processes(case, losses_on)
    for name in case.out:
        case.compare(name, torch.stack([found[name] for found in ranks]), TOLERANCE)


# --- schedules, average, optimiser -----------------------------------------------------------------------------------


@family("mocov3", "momentum_cos_")
def momentum(case: Case) -> None:
    clock, m = (
        one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs")),
        Cosine(case.number("moco_m"), 1.0),
    )
    case.compare("momentum", [m(step, clock) for step in range(clock.total_steps)], 1e-12)


@family("mocov3", "lr_")
def learning_rate(case: Case) -> None:
    clock = one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs"), case.number("batch_size"))
    case.compare("lr", rates_of(warmed(case.number("warmup_epochs")), clock, case.number("lr")), 1e-12)


def warmed(epochs: float) -> Warmup:
    return Warmup(epochs, 0.0, Cosine(1.0, 0.0))


@family("mocov3", "ema_")
def average(case: Case) -> None:
    teacher = EMATeacher(nested(case.tensors("sd__momentum_encoder.")), buffers="keep")
    teacher.update(nested(case.tensors("sd__base_encoder.")), case.number("momentum"))
    compare_state(case, "sd__momentum_encoder.", teacher.module.state_dict(), 1e-12)


@family("mocov3", "lars_")
def lars(case: Case) -> None:
    lars_trajectory(case, split_no_decay, trust_coefficient=case.number("trust_coefficient"))


# --- networks --------------------------------------------------------------------------------------------------------


@family("mocov3", "head_")
def heads(case: Case) -> None:
    method = MoCoV3(
        NoBackbone(case.number("in_dim")), hidden_dim=case.number("mlp_dim"), dim=case.number("dim"),
        heads="vit" if case.number("vit") else "resnet",
    ).double()  # fmt: skip
    method.load_state_dict(method.state_dict() | case.tensors("sd__"))
    x = case.tensor("x", requires_grad=True)
    z = method.projector(x)
    p = method.predictor(z)
    (p * case.tensor("upstream")).sum().backward()
    case.compare("z", z, TOLERANCE)
    case.compare("p", p, TOLERANCE)
    case.compare("grad_x", x.grad, TOLERANCE)
    compare_state(case, "grad__", {name: q.grad for name, q in method.named_parameters()}, TOLERANCE)
    compare_state(case, "sd__", method.state_dict(), TOLERANCE)


@family("mocov3", "sincos_")
def positions(case: Case) -> None:
    """The authors walk along ``grid_w`` slowly and along ``grid_h`` fast."""
    grid = case.number("grid_w"), case.number("grid_h")
    table = sincos_2d(grid, case.number("dim"), first="row", temperature=case.number("temperature"))
    case.compare("pos_embed", table, TOLERANCE)
    if grid[0] == grid[1]:
        vit = tiny_vit(4 * grid[0], 4, case.number("dim"), 1, 1, MoCoViT)
        case.compare("pos_embed", vit.pos_embed, 2e-6)


@family("mocov3", "convstem_")
def conv_stem(case: Case) -> None:
    stem = ConvStem(case.number("img_size"), 16, 3, case.number("embed_dim")).double()
    stem.load_state_dict(case.tensors("sd__"))
    x = case.tensor("x")
    tokens = stem(x)
    if "upstream" in case.inp:
        (tokens * case.tensor("upstream")).sum().backward()
    case.compare("tokens", tokens, TOLERANCE)
    compare_state(case, "grad__", {name: p.grad for name, p in stem.named_parameters()}, TOLERANCE)
    compare_state(case, "sd__", stem.state_dict(), TOLERANCE)
    case.compare("tokens_eval", stem.eval()(x), TOLERANCE)


def vit_of(case: Case, width: str = "dim") -> MoCoViT:
    sizes = [case.number(name) for name in ("img_size", "patch_size", width, "depth", "heads")]
    options = {"embed_layer": ConvStem} if "conv_stem" in case.hp and case.number("conv_stem") else {}
    vit = tiny_vit(*sizes, MoCoViT, **options).double()
    assert isinstance(vit, MoCoViT)
    return vit


@family("mocov3", "vit_")
def transformer(case: Case) -> None:
    vit = vit_of(case)
    MoCoV3(vit, hidden_dim=2, dim=2, freeze_patches=bool(case.number("stop_grad_conv1")))
    vit.load_state_dict(case.tensors("sd__"))
    feature = vit(case.tensor("x"))
    (feature * case.tensor("upstream")).sum().backward()
    case.compare("feature", feature, TOLERANCE)
    found = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    assert set(found) == {name.removeprefix("grad__") for name in case.out if name.startswith("grad__")}
    compare_state(case, "grad__", found, TOLERANCE)
    if any(name.startswith("sd__") for name in case.out):
        compare_state(case, "sd__", vit.state_dict(), TOLERANCE)


@family("mocov3", "steps_")
def training(case: Case) -> None:
    adamw, n, epochs = case.number("adamw"), case.number("iters_per_epoch"), case.number("epochs")
    backbone: nn.Module = vit_of(case, "vit_dim") if "vit_dim" in case.hp else TinyNet(case.number("width"))
    method = MoCoV3(
        backbone, hidden_dim=case.number("mlp_dim"), dim=case.number("dim"), temperature=case.number("temperature")
    ).double()  # fmt: skip
    head = "head." if "vit_dim" in case.hp else "fc."
    ours = (
        (f"base_encoder.{head}", "projector."), ("base_encoder.", "backbone."),
        (f"momentum_encoder.{head}", "momentum_encoder.module.1."), ("momentum_encoder.", "momentum_encoder.module.0."),
    )  # fmt: skip
    method.load_state_dict(renamed(case.tensors("sd__"), *ours))
    decay = case.number("weight_decay")
    optimizer: Any = partial(torch.optim.AdamW, weight_decay=decay)
    if not adamw:
        optimizer = partial(LARS, weight_decay=decay, momentum=case.number("sgd_momentum"), variant="torch")
    m: Schedule = Cosine(case.number("moco_m"), 1.0) if case.number("moco_m_cos") else Constant(case.number("moco_m"))
    schedules = {"lr": warmed(case.number("warmup_epochs")), "teacher_momentum": m}
    recipe = OptimizationRecipe(optimizer, case.number("lr"), schedules, "linear")
    clock = one_epoch_steps(n, epochs, case.number("batch_size"))
    momenta: list[float] = []
    found, rates = run_steps(
        method, recipe, clock, (two_views(case, step) for step in range(n * epochs)),
        after=lambda step, _: momenta.append(method.scheduled["teacher_momentum"]),
    )  # fmt: skip
    case.compare("loss", stacked(found, "loss"), 1e-7)
    case.compare("lr", [row[0] for row in rates], 1e-12)
    case.compare("momentum", momenta, 1e-12)
    theirs = tuple((new, old) for old, new in ours)
    compare_state(case, "sd__", renamed(method.state_dict(), *theirs), 1e-7)
