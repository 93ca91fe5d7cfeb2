"""The numbers of VICReg's authors (facebookresearch/vicreg, main_vicreg.py)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from selfsight.losses.vicreg import vicreg
from selfsight.methods.vicreg import VICReg
from selfsight.optim.groups import split_no_decay
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
COEFFICIENTS = ("sim_coeff", "std_coeff", "cov_coeff")


def losses(x: Tensor, y: Tensor, weights: list[float], batch_size: int) -> dict[str, Tensor]:
    x, y = x.requires_grad_(), y.requires_grad_()
    terms = vicreg(x, y, batch_size=batch_size)
    loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    names = ("repr_loss", "std_loss", "cov_loss")
    found = dict(zip(names, (term.detach() for term in terms), strict=True))
    return found | {"loss": loss.detach()} | gradients({"x": x, "y": y})


@family("vicreg", "loss_")
def loss(case: Case) -> None:
    weights = [case.number(name) for name in COEFFICIENTS]
    for name, value in losses(case.tensor("x"), case.tensor("y"), weights, case.number("batch_size")).items():
        case.compare(name, value, TOLERANCE)


def losses_on(rank: int, case: Case) -> dict[str, Tensor]:
    x, y = (case.tensor(name)[rank].clone() for name in ("x", "y"))
    return losses(x, y, [case.number(name) for name in COEFFICIENTS], case.number("batch_size"))


@family("vicreg", "loss_#rank", slow=True)
def loss_on_processes(case: Case) -> None:
    ranks, W = of_processes(case, losses_on), case.number("world_size")
    for name in case.out:
        got = torch.stack([found[name.removesuffix("_ddp")] for found in ranks])
        case.compare(name, got / W if name.endswith("_ddp") else got, TOLERANCE)


@family("vicreg", "projector_")
def expander(case: Case) -> None:
    method = VICReg(NoBackbone(case.number("in_dim")), expander=case.number("layers"))
    module_case(case, method.projector, y="z", tolerance=TOLERANCE)


def warmed(epochs: float) -> Warmup:
    return Warmup(epochs, 0.0, Cosine(1.0, 0.001))


@family("vicreg", "lr_")
def learning_rate(case: Case) -> None:
    clock = one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs"), case.number("batch_size"))
    case.compare("lr", rates_of(warmed(case.number("warmup_epochs")), clock, case.number("base_lr")), 1e-12)


@family("vicreg", "lars_")
def lars(case: Case) -> None:
    lars_trajectory(case, split_no_decay, trust_coefficient=case.number("eta"))


@family("vicreg", "steps_")
def training(case: Case) -> None:
    n, epochs, first = case.number("iters_per_epoch"), case.number("epochs"), case.number("first_step")
    weights = {name: case.number(name) for name in COEFFICIENTS}
    method = VICReg(TinyNet(case.number("width")), expander=case.number("layers"), **weights).double()
    method.load_state_dict(case.tensors("sd__"))
    options = {name: case.number(name) for name in ("momentum", "weight_decay")}
    optimizer = partial(LARS, **options, trust_coefficient=case.number("eta"), variant="torch")
    schedule = warmed(case.number("warmup_epochs"))
    recipe = OptimizationRecipe(optimizer, case.number("base_lr"), {"lr": schedule}, "linear")
    clock = one_epoch_steps(n, epochs, case.number("batch_size"))
    found, rates = run_steps(
        method, recipe, clock, (two_views(case, step) for step in range(first, n * epochs)), first=first
    )
    case.compare("loss", stacked(found, "loss"), 1e-7)
    case.compare("lr", [row[0] for row in rates], 1e-12)
    compare_state(case, "sd__", method.state_dict(), 1e-7)
