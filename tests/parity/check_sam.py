"""Sharpness-aware minimisation: davda54/sam, SamsungLabs/ASAM, and google-research/sam by its rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.nn.batchnorm import frozen_statistics
from selfsight.optim.groups import l2_penalty
from selfsight.optim.sam import SAM

from .harness import Case, family

TOLERANCE = 1e-9
NAMES = {"0.weight": "w1", "0.bias": "b1", "2.weight": "w2", "2.bias": "b2"}


def base_of(case: Case) -> Any:
    if "betas" in case.hp:
        options = {name: case.number(name) for name in ("weight_decay", "eps")}
        return partial(torch.optim.AdamW, betas=tuple(case.number("betas")), **options)
    decay = case.number("weight_decay") if not case.name.startswith("google") and "weight_decay" in case.hp else 0.0
    return partial(torch.optim.SGD, momentum=case.number("momentum"), weight_decay=decay)


def trajectory(case: Case, tolerance: float, penalty: float = 0.0, **options: Any) -> None:
    """Two passes a step; what the weights are in the second pass is noted there."""
    shapes = case.inp["w1"].shape, case.inp["w2"].shape
    model = nn.Sequential(nn.Linear(*shapes[0][::-1]), nn.Tanh(), nn.Linear(*shapes[1][::-1])).double()
    model.load_state_dict({ours: case.tensor(name) for ours, name in NAMES.items()})
    optimizer = SAM(model.parameters(), case.number("lr"), base=base_of(case), rho=case.number("rho"), **options)
    rows: dict[str, list[Tensor]] = {}
    for x, y in zip(case.tensor("x"), case.tensor("y"), strict=True):
        passes: list[tuple[Tensor, dict[str, Tensor]]] = []

        def closure(x: Tensor = x, y: Tensor = y, passes: list[Any] = passes) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + l2_penalty(model.parameters(), penalty)).backward()
            passes.append((loss.detach(), {n: p.detach().clone() for n, p in model.named_parameters()}))
            return loss

        optimizer.step(closure)
        (loss, _), (nearby, perturbed) = passes
        assert optimizer.gradient_norm is not None
        found = {"loss": loss, "loss_perturbed": nearby, "grad_norm": optimizer.gradient_norm}
        found |= {f"perturbed_{NAMES[name]}": value for name, value in perturbed.items()}
        found |= {NAMES[name]: p.detach().clone() for name, p in model.named_parameters()}
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        if name in case.out:
            case.compare(name, torch.stack(values), tolerance)


@family("sam", "sam_", "adaptive_")
def davda54(case: Case) -> None:
    trajectory(case, TOLERANCE, scale="weights" if case.number("adaptive") else "none")


@family("sam", "asam_")
def samsung(case: Case) -> None:
    trajectory(case, 1e-8, scale="asam", eta=case.number("eta"), eps=1e-16)


@family("sam", "google_")
def google(case: Case) -> None:
    options = {"eps": 0.0, "max_norm": case.number("gradient_clipping")}
    trajectory(case, TOLERANCE, penalty=case.number("weight_decay"), **options)


@family("sam", "batchnorm_")
def running_statistics(case: Case) -> None:
    width, classes = case.inp["0_weight"].shape[0], case.inp["3_weight"].shape[0]
    norm = nn.BatchNorm1d(width, momentum=case.number("bn_momentum"))
    model = nn.Sequential(nn.Linear(case.inp["x"].shape[-1], width), norm, nn.ReLU(), nn.Linear(width, classes))
    names = {f"{i}.{kind}": f"{i}_{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    model.double().load_state_dict({ours: case.tensor(n) for ours, n in names.items()}, strict=False)
    base = partial(torch.optim.SGD, momentum=case.number("momentum"))
    optimizer = SAM(model.parameters(), case.number("lr"), base=base, rho=case.number("rho"))
    optimizer.around_second_pass = lambda: frozen_statistics(model)
    rows: dict[str, list[Tensor]] = {"running_mean": [], "running_var": [], "weight": []}
    for x, y in zip(case.tensor("x"), case.tensor("y"), strict=True):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        for name, values in rows.items():
            values.append((model[0].weight if name == "weight" else getattr(norm, name)).detach().clone())
    for name, values in rows.items():
        case.compare(name, torch.stack(values), TOLERANCE)
    case.compare("batches_tracked", norm.num_batches_tracked, 0)
