"""The numbers of SimSiam's authors (facebookresearch/simsiam: builder.py, main_simsiam.py)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from selfsight.losses.simsiam import simsiam
from selfsight.methods.simsiam import SimSiam
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Cosine

from .harness import Case, family
from .networks import (
    NoBackbone,
    TinyNet,
    compare_state,
    one_epoch_steps,
    rates_of,
    renamed,
    run_steps,
    stacked,
    two_views,
)  # fmt: skip

TOLERANCE = 1e-9
OURS = ("encoder.fc.", "projector."), ("encoder.", "backbone.")
THEIRS = ("projector.", "encoder.fc."), ("backbone.", "encoder.")
COSINE = Cosine(1.0, 0.0, per="epoch")


@family("simsiam", "loss_")
def loss(case: Case) -> None:
    p = [case.tensor(name, requires_grad=True) for name in ("p1", "p2")]
    z = [case.tensor(name, requires_grad=True) for name in ("z1", "z2")]
    value = simsiam(*p, *z)
    value.backward()
    assert z[0].grad is None, "targets get no gradient"
    case.compare("loss", value, TOLERANCE)
    for i in (0, 1):
        case.compare(f"grad_p{i + 1}", p[i].grad, TOLERANCE)


@family("simsiam", "head_")
def heads(case: Case) -> None:
    backbone = NoBackbone(case.number("in_dim"))
    method = SimSiam(backbone, dim=case.number("dim"), predictor_dim=case.number("pred_dim")).double()
    method.load_state_dict(method.state_dict() | case.tensors("sd__"))
    x = case.tensor("x", requires_grad=True)
    z = method.projector(x)
    p = method.predictor(z)
    (p * case.tensor("upstream")).sum().backward()
    case.compare("z", z, TOLERANCE)
    case.compare("p", p, TOLERANCE)
    case.compare("grad_x", x.grad, TOLERANCE)
    gradients = {name: q.grad for name, q in method.named_parameters()}
    assert [name for name, g in gradients.items() if g is None] == ["projector.6.bias"]
    compare_state(case, "grad__", gradients, TOLERANCE)
    compare_state(case, "sd__", method.state_dict(), TOLERANCE)
    method.eval()
    case.compare("z_eval", method.projector(x), TOLERANCE)
    case.compare("p_eval", method.predictor(method.projector(x)), TOLERANCE)


@family("simsiam", "lr_")
def learning_rates(case: Case) -> None:
    lr, clock = case.number("lr"), one_epoch_steps(1, case.number("epochs"), case.number("batch_size"))
    falling = rates_of(COSINE, clock, lr)
    peak = OptimizationRecipe(torch.optim.SGD, lr, scaling="linear").peak_lr(clock.batch_size)
    case.compare("lr", np.stack([falling, np.full_like(falling, peak)], 1), 1e-12)


@family("simsiam", "steps_")
def training(case: Case) -> None:
    n, epochs = case.number("iters_per_epoch"), case.number("epochs")
    method = SimSiam(
        TinyNet(case.number("width")), dim=case.number("dim"), predictor_dim=case.number("pred_dim"),
        constant_predictor_lr=bool(case.number("fix_pred_lr")),
    ).double()  # fmt: skip
    method.load_state_dict(renamed(case.tensors("sd__"), *OURS))
    options = {name: case.number(name) for name in ("momentum", "weight_decay")}
    recipe = OptimizationRecipe(partial(torch.optim.SGD, **options), case.number("lr"), {"lr": COSINE}, "linear")
    clock = one_epoch_steps(n, epochs, case.number("batch_size"))
    found, rates = run_steps(method, recipe, clock, (two_views(case, step) for step in range(n * epochs)))
    case.compare("loss", stacked(found, "loss"), 1e-7)
    case.compare("lr", rates[::n], 1e-12)
    compare_state(case, "sd__", renamed(method.state_dict(), *THEIRS), 1e-7)
