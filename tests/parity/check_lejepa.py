"""The numbers of LeJEPA's authors (galilai-group/lejepa: SIGReg, MINIMAL.md).

Derived: ``multicrop_`` by the paper's formula, ``steps_`` by a loop of MINIMAL.md's lines.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.losses.lejepa import epps_pulley, lejepa, random_directions, sigreg, unit_columns
from selfsight.methods.lejepa import LeJEPA
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Cosine, Warmup

from .harness import Case, family
from .networks import TinyNet, compare_state, gradients, of_processes, one_epoch_steps, rates_of, run_steps, stacked

TOLERANCE = 1e-9
REDUCTIONS: tuple[Literal["mean", "sum", "none"], ...] = ("mean", "sum", "none")


def integral(case: Case) -> dict[str, Any]:
    """The hyper-parameters of the integral, whatever the case calls the knots."""
    return {"t_max": case.number("t_max"), "points": case.number("knots" if "knots" in case.hp else "n_points")}


@family("lejepa", "epps_")
def normality(case: Case) -> None:
    single = case.name.startswith("epps_float32")
    x = case.tensor("x", None if single else torch.float64, requires_grad=True)
    statistic = epps_pulley(x, **integral(case))
    statistic.sum().backward()
    assert statistic.dtype == x.dtype
    case.compare("statistic", statistic, 1e-5 if single else TOLERANCE)
    case.compare("grad_x", x.grad, 1e-5 if single else TOLERANCE)


@family("lejepa", "sigreg_")
def regulariser(case: Case) -> None:
    x, A = case.tensor("x", requires_grad=True), unit_columns(case.tensor("gaussian"))
    clip = case.number("clip_value")
    statistic = sigreg(
        x, A, **integral(case), reduction=REDUCTIONS[case.number("reduction")], clip=None if clip < 0 else clip
    )
    statistic.sum().backward()
    case.compare("statistic", statistic, TOLERANCE)
    case.compare("grad_x", x.grad, TOLERANCE)
    case.compare("directions", A, TOLERANCE)


def regulariser_on(rank: int, case: Case) -> dict[str, Tensor]:
    x = case.tensor("x")[rank].clone().requires_grad_()
    statistic = sigreg(x, unit_columns(case.tensor("gaussian")), **integral(case))
    statistic.backward()
    return {"statistic": statistic.detach()} | gradients({"x": x})


@family("lejepa", "sigreg_#rank", slow=True)
def regulariser_on_processes(case: Case) -> None:
    ranks, W = of_processes(case, regulariser_on), case.number("world_size")
    for name in case.out:
        got = torch.stack([found[name.removesuffix("_ddp")] for found in ranks])
        case.compare(name, got / W if name.endswith("_ddp") else got, TOLERANCE)


@family("lejepa", "directions_")
def directions(case: Case) -> None:
    step = case.number("step")
    A = random_directions(step, case.number("dim"), case.number("num_slices"))
    assert A.dtype == torch.float32
    case.compare("directions", A, 1e-6)
    case.compare("next_step", step + 1, 0)


@family("lejepa", "loss_", "multicrop_")
def loss(case: Case) -> None:
    z = case.tensor("proj", requires_grad=True)
    n_global = case.number("n_global") if "n_global" in case.hp else None
    A = unit_columns(case.tensor("gaussian"))
    terms = lejepa(z, A, lambd=case.number("lamb"), n_global=n_global, **integral(case))
    terms.loss.backward()
    for name, value in terms._asdict().items():
        case.compare(name, value, TOLERANCE)
    case.compare("grad_proj", z.grad, TOLERANCE)


def warmed(start: float, end: float) -> Warmup:
    return Warmup(1, start, Cosine(1.0, end))


@family("lejepa", "lr_")
def learning_rates(case: Case) -> None:
    clock = one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs"))
    lrs = [case.number(name) for name in ("lr", "probe_lr")]
    start, end = case.number("start_factor"), case.number("eta_min")
    case.compare("lr", np.stack([rates_of(warmed(start, end / lr), clock, lr) for lr in lrs], 1), 1e-12)


class GivenDirections(LeJEPA):
    """Directions come from the case."""

    given: Tensor

    def directions(self, z: Tensor) -> Tensor:
        return unit_columns(self.given[self.step])


def ours(name: str) -> str:
    """MINIMAL.md's names: its backbone ends with a linear layer, its projector has dropout after every layer."""
    if name.startswith("backbone.fc."):
        return name.replace("backbone.fc.", "embedding.")
    if name.startswith("proj."):
        _, i, rest = name.split(".")
        return f"projector.{int(i) // 4 * 3 + int(i) % 4}.{rest}"
    return name


@family("lejepa", "steps_")
def training(case: Case) -> None:
    n, epochs, lr = case.number("iters_per_epoch"), case.number("epochs"), case.number("lr")
    method = GivenDirections(
        TinyNet(case.number("width")), embedding_dim=case.number("emb_dim"), projector=case.number("layers"),
        lambd=case.number("lamb"), slices=case.number("num_slices"), points=case.number("knots"), n_global=None,
    ).double()  # fmt: skip
    method.load_state_dict({ours(name): value for name, value in case.tensors("sd__").items()})
    method.given = case.tensor("gaussian")
    views = case.tensor("views")  # [iterations, B, V, 3, H, W]
    optimizer = partial(torch.optim.AdamW, weight_decay=case.number("weight_decay"))
    schedule = warmed(case.number("start_factor"), case.number("eta_min") / lr)
    recipe = OptimizationRecipe(optimizer, lr, {"lr": schedule})
    batches = (
        Batch(list(views[step % n].unbind(1)), torch.arange(case.number("batch_size"))) for step in range(n * epochs)
    )
    found, rates = run_steps(method, recipe, one_epoch_steps(n, epochs), batches)
    for name in ("loss", "invariance", "sigreg"):
        case.compare(name, stacked(found, name), 1e-7)
    case.compare("lr", [row[0] for row in rates], 1e-12)
    state = method.state_dict()
    theirs = {name.removeprefix("sd__"): state[ours(name.removeprefix("sd__"))] for name in case.out if "sd__" in name}
    compare_state(case, "sd__", theirs, 1e-7)
