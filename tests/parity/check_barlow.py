"""The numbers of Barlow Twins' authors (facebookresearch/barlowtwins, main.py)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.losses.barlow import barlow_twins
from selfsight.methods.barlow import BarlowTwins, scale_gradient
from selfsight.nn.batchnorm import SharedBatchNorm1d
from selfsight.optim.groups import all_parameters, split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Cosine, Warmup

from .harness import Case, family
from .networks import (
    NoBackbone,
    TinyNet,
    compare_state,
    gradients,
    lars_trajectory,
    module_case,
    of_processes,
    one_epoch_steps,
    rates_of,
    run_steps,
    stacked,
    two_views,
)  # fmt: skip

TOLERANCE = 1e-9


def losses(z1: Tensor, z2: Tensor, bn: nn.Module, lambd: float, batch_size: int, scale: float) -> dict[str, Tensor]:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    terms = barlow_twins(bn(z1), bn(z2), batch_size=batch_size)
    loss = terms.on_diagonal + lambd * terms.off_diagonal
    scale_gradient(loss, scale).backward()
    found = {"loss": loss.detach(), "on_diag": terms.on_diagonal.detach()}
    return found | gradients({"z1": z1, "z2": z2})


@family("barlow", "loss_")
def loss(case: Case) -> None:
    bn = SharedBatchNorm1d(case.inp["z1"].shape[-1], affine=False).double()
    found = losses(case.tensor("z1"), case.tensor("z2"), bn, case.number("lambd"), case.number("batch_size"), 1.0)
    for name, value in (found | {name: getattr(bn, name) for name in ("running_mean", "running_var")}).items():
        case.compare(name, value, TOLERANCE)


def losses_on(rank: int, case: Case) -> dict[str, Tensor]:
    """With the authors' gradient and, as ``grad_*_full``, with ours divided as data parallel training divides it."""
    z1, z2 = (case.tensor(name) for name in ("z1", "z2"))
    bn = SharedBatchNorm1d(z1.shape[-1], affine=False).double()
    options = bn, case.number("lambd"), case.number("batch_size")
    official, ours = (losses(z1[rank], z2[rank], *options, scale) for scale in (1 / len(z1), 1.0))
    return official | {f"{name}_full": ours[name] / len(z1) for name in ("grad_z1", "grad_z2")}


@family("barlow", "loss_#rank", slow=True)
def loss_on_processes(case: Case) -> None:
    ranks = of_processes(case, losses_on)
    for name in case.out:
        case.compare(name, torch.stack([found[name] for found in ranks]), TOLERANCE)


@family("barlow", "projector_")
def projector(case: Case) -> None:
    method = BarlowTwins(NoBackbone(case.number("in_dim")), projector=case.number("layers"))
    module_case(case, method.projector, y="z", tolerance=TOLERANCE)


def warmed(epochs: float) -> Warmup:
    return Warmup(epochs, 0.0, Cosine(1.0, 0.001))


@family("barlow", "lr_")
def learning_rates(case: Case) -> None:
    clock = one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs"), case.number("batch_size"))
    schedule = warmed(case.number("warmup_epochs"))
    kinds = [rates_of(schedule, clock, case.number(f"learning_rate_{kind}")) for kind in ("weights", "biases")]
    case.compare("lr", np.stack(kinds, 1), 1e-12)


@family("barlow", "lars_")
def lars(case: Case) -> None:
    flags = case.number("exclude_1d_from_decay"), case.number("exclude_1d_from_adaptation")
    assert flags in ((0, 0), (1, 1)), "no group is left out of one of the two alone"

    def one_dimensional_apart(module: nn.Module) -> list[dict[str, object]]:
        if flags == (1, 1):
            return split_no_decay(module)
        (group,) = all_parameters(module)
        return [group | {"params": [p for p in group["params"] if (p.ndim == 1) == flat]} for flat in (False, True)]

    lars_trajectory(case, one_dimensional_apart, trust_coefficient=case.number("eta"))


@family("barlow", "steps_")
def training(case: Case) -> None:
    n, epochs, first = case.number("iters_per_epoch"), case.number("epochs"), case.number("first_step")
    lr, bias_lr = case.number("learning_rate_weights"), case.number("learning_rate_biases")
    method = BarlowTwins(
        TinyNet(case.number("width")), projector=case.number("layers"), lambd=case.number("lambd"), bias_lr=bias_lr / lr
    ).double()
    method.load_state_dict(case.tensors("sd__"))
    options = {name: case.number(name) for name in ("momentum", "weight_decay")}
    optimizer = partial(LARS, **options, trust_coefficient=case.number("eta"), variant="torch")
    recipe = OptimizationRecipe(optimizer, lr, {"lr": warmed(case.number("warmup_epochs"))}, "linear")
    clock = one_epoch_steps(n, epochs, case.number("batch_size"))
    found, rates = run_steps(
        method, recipe, clock, (two_views(case, step) for step in range(first, n * epochs)), first=first
    )
    case.compare("loss", stacked(found, "loss"), 1e-7)
    case.compare("lr", rates, 1e-12)
    compare_state(case, "sd__", method.state_dict(), 1e-7)
