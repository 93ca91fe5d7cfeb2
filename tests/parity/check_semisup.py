"""MixMatch's family: microsoft/Semi-supervised-learning (USB), google-research/remixmatch and Labbeti/SSLH."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch, SemiBatch
from selfsight.losses import cotraining
from selfsight.losses.semi import cross_entropy, guess, interleave, mix_up, sharpen, squared_error
from selfsight.methods.semi.alignment import Alignment, WindowAlignment
from selfsight.methods.semi.meanteacher import MeanTeacher
from selfsight.methods.semi.mixmatch import MixMatch
from selfsight.methods.semi.remixmatch import ReMixMatch
from selfsight.nn.rotate import rotate_quarters
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Constant, Ramp, RunningAverage

from .harness import Case, family
from .networks import gradients, one_epoch_steps

TOLERANCE = 1e-9


# --- alignment, guesses, mixtures ------------------------------------------------------------------------------------


@family("semisup", "align_ema")
def running_alignment(case: Case) -> None:
    p = case.tensor("prob")
    alignment = Alignment(p.shape[-1], case.number("momentum"), case.tensor("p_target")).double()
    alignment.target.copy_(case.tensor("p_target"))
    aligned, model = [], []
    for rows in p:
        aligned.append(alignment(rows))
        alignment.commit()
        model.append(alignment.model.clone())
    case.compare("aligned", torch.stack(aligned), TOLERANCE)
    case.compare("p_model", torch.stack(model), TOLERANCE)


@family("semisup", "align_window")
def window_alignment(case: Case) -> None:
    p = case.tensor("prob")
    alignment = WindowAlignment(p.shape[-1], case.number("window"), case.tensor("p_target")).double()
    uniform = torch.full_like(p[0, 0], 1 / p.shape[-1])
    alignment.window.copy_(uniform.expand_as(alignment.window))
    aligned, model = [], []
    for rows in p:
        model.append(alignment.model.clone())
        aligned.append(alignment(rows))
        alignment.commit()
    case.compare("aligned", torch.stack(aligned), TOLERANCE)
    case.compare("p_model", torch.stack(model), TOLERANCE)


@family("semisup", "average_")
def average_of_history(case: Case) -> None:
    p = case.tensor("prob")
    alignment, model = WindowAlignment(p.shape[-1], case.number("history"), start="empty").double(), []
    for rows in p:
        alignment(rows)
        alignment.commit()
        model.append(alignment.model.clone())
    case.compare("p_model", torch.stack(model), TOLERANCE)


@family("semisup", "sharpen_")
def sharpening(case: Case) -> None:
    case.compare("sharpened", sharpen(case.tensor("prob"), case.number("temperature")), TOLERANCE)


@family("semisup", "guess_")
def guessing(case: Case) -> None:
    case.compare("guess", guess(case.tensor("logits"), case.number("temperature")), TOLERANCE)


@family("semisup", "mixup_")
def mixing(case: Case) -> None:
    draw, order = case.number("draw"), case.tensor("permutation")
    for name in ("x", "y"):
        case.compare(name, mix_up(case.tensor(name), draw, order), TOLERANCE)
    case.compare("lam", mix_up(torch.tensor([1.0, 0.0]).double(), draw, torch.tensor([1, 0]))[0], TOLERANCE)


@family("semisup", "interleave_")
def interleaving(case: Case) -> None:
    y = interleave(case.tensor("x"))
    case.compare("y", y, 0)
    case.compare("back", interleave(y), 0)


@family("semisup", "rotation_")
def quarters(case: Case) -> None:
    turned, labels = rotate_quarters(case.tensor("x_nhwc").permute(0, 3, 1, 2))
    case.compare("x_nhwc", turned.permute(0, 2, 3, 1), 0)
    case.compare("label", labels, 0)


@family("semisup", "ramp_")
def ramps(case: Case) -> None:
    n = len(case.out["value"])
    if case.name.startswith("ramp_usb"):
        ramp, clock = Ramp(0.0, 1.0, case.number("warm_up")), one_epoch_steps(1, case.number("iterations"))
    else:
        shape: Any = "exp" if case.name.startswith("ramp_exp") else "linear"
        ramp = Ramp(case.number("start_value"), case.number("target"), case.number("length") / n, shape)
        clock = one_epoch_steps(1, n)
        assert case.number("start_step") == 0
    case.compare("value", [ramp(step, clock) for step in range(n)], TOLERANCE)


# --- whole losses ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``tanh(F x)``."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.num_features = len(bias)
        self.f = nn.Linear(weight.shape[1], len(bias), dtype=weight.dtype)
        self.f.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(x))


def prepared(case: Case, method: MixMatch) -> MixMatch:
    """The method in float64 with the case's heads, its draws, and the step of the case."""
    method.double()
    method.heads.load_state_dict({name: case.tensor(f"c_{name}") for name in ("weight", "bias")})
    method.draw = lambda rows: (case.number("draw"), case.tensor("permutation"))  # type: ignore[method-assign]
    method.clock, method.step = one_epoch_steps(1, case.number("iterations")), case.number("iteration")
    return method


def step(case: Case, method: MixMatch, views: list[Tensor]) -> dict[str, Tensor]:
    x, y = case.tensor("x_labelled"), case.tensor("labels")
    batch = SemiBatch(Batch([x], torch.arange(len(x)), y), Batch(views, torch.arange(len(views[0]))))
    found = dict(method.training_step(batch, 0))
    found["loss"].backward()
    case.compare("loss", found["loss"], TOLERANCE)
    case.compare("loss_supervised", found["loss_sup"], TOLERANCE)
    layers = {"f": method.backbone.f, "c": method.heads}
    if getattr(method, "rotation_head", None) is not None:
        layers["r"] = method.rotation_head
    for prefix in ("f", "c", "r"):
        for name in ("weight", "bias"):
            parameter = getattr(layers[prefix], name) if prefix in layers else None
            shape = case.out[f"grad_{prefix}_{name}"].shape
            got = torch.zeros(shape) if parameter is None or parameter.grad is None else parameter.grad
            case.compare(f"grad_{prefix}_{name}", got, TOLERANCE)
    return found


def backbone(case: Case) -> Net:
    return Net(case.tensor("f_weight"), case.tensor("f_bias")).double()


@family("semisup", "remixmatch_")
def remixmatch(case: Case) -> None:
    classes = case.inp["c_weight"].shape[0]
    method = ReMixMatch(
        backbone(case), labels=case.tensor("labels"), num_classes=classes, T=case.number("temperature"),
        lambda_u=case.number("lambda_u"), lambda_s=case.number("lambda_kl"), lambda_r=case.number("lambda_rot"),
        ramp=case.number("warm_up"), m=case.number("momentum"),
    )  # fmt: skip
    prepared(case, method)
    if method.rotation_head is not None:
        method.rotation_head.load_state_dict({name: case.tensor(f"r_{name}") for name in ("weight", "bias")})
    method.turned = lambda _: (case.tensor("x_rotated"), case.tensor("rotation"))  # type: ignore[method-assign]
    alignment = method.alignment
    assert isinstance(alignment, Alignment)
    alignment.model.copy_(case.tensor("p_model"))
    alignment.target.copy_(case.tensor("p_target"))
    alignment.started.fill_(True)
    found = step(case, method, [case.tensor(f"x_{name}") for name in ("weak", "strong0", "strong1")])
    alignment.commit()
    case.compare("p_model", alignment.model, TOLERANCE)
    unsupervised = {"loss_mixed": found["loss_mixed"], "loss_unsup": found["loss_unsup"]}
    case.compare("loss_unsupervised", unsupervised["loss_mixed"], TOLERANCE)


@family("semisup", "mixmatch_")
def mixmatch(case: Case) -> None:
    method = MixMatch(
        backbone(case), labels=case.tensor("labels"), num_classes=case.inp["c_weight"].shape[0],
        T=case.number("temperature"), mixup_alpha=0.5, lambda_u=case.number("lambda_u"), ramp=case.number("warm_up"),
    )  # fmt: skip
    found = step(case, prepared(case, method), [case.tensor(f"x_view{i}") for i in (0, 1)])
    case.compare("loss_unsupervised", found["loss_unsup"], TOLERANCE)


# --- Mean Teacher ----------------------------------------------------------------------------------------------------


@family("semisup", "meanteacher_loss")
def consistency(case: Case) -> None:
    labelled, student = (case.tensor(f"logits_{name}", requires_grad=True) for name in ("labelled", "student"))
    inconsistency = squared_error(student, case.tensor("logits_teacher").softmax(-1))
    ramp = Ramp(0.0, 1.0, case.number("warm_up"))(
        case.number("iteration"), one_epoch_steps(1, case.number("iterations"))
    )
    loss = cross_entropy(labelled, case.tensor("labels")) + case.number("weight") * ramp * inconsistency
    loss.backward()
    case.compare("loss", loss, TOLERANCE)
    case.compare("loss_consistency", inconsistency, TOLERANCE)
    for name, gradient in gradients({"student": student, "labelled": labelled}).items():
        case.compare(name, gradient, TOLERANCE)


@family("semisup", "meanteacher_steps", "meanteacher_decay")
def steps_of_the_teacher(case: Case) -> None:
    hidden, classes = case.inp["student_w1"].shape[0], case.inp["student_w2"].shape[0]
    method = MeanTeacher(
        Net(case.tensor("student_w1"), case.tensor("student_b1")), labels=case.tensor("labels")[0], num_classes=classes,
        weight=case.number("lambda"), ramp=0.0, labelled_consistency=True, teacher_moves="before",
    ).double()  # fmt: skip
    assert hidden == method.backbone.num_features
    layers: dict[str, Callable[[nn.Module], nn.Module]] = {"1": lambda net: net.backbone.f, "2": lambda net: net.heads}
    networks = {"student": method.student, "teacher": method.teacher.module}
    for who, network in networks.items():
        for i, layer in layers.items():
            state = {"weight": case.tensor(f"{who}_w{i}"), "bias": case.tensor(f"{who}_b{i}")}
            layer(network).load_state_dict(state)
    recipe = OptimizationRecipe(
        torch.optim.SGD, case.number("lr"),
        {"lr": Constant(1.0), "teacher_momentum": RunningAverage(case.number("decay"))},
    )  # fmt: skip
    T = len(case.inp["labels"])
    optimizer = method.configure(recipe, one_epoch_steps(1, T)).configure_optimizers()
    rows: dict[str, list[Tensor]] = {}
    for t in range(T):
        views = {n: case.tensor(n)[t] for n in case.inp if n.endswith("labelled")}
        batch = SemiBatch(
            Batch([views["student_labelled"], views["teacher_labelled"]], torch.arange(4), case.tensor("labels")[t]),
            Batch([views["student_unlabelled"], views["teacher_unlabelled"]], torch.arange(8)),
        )
        method.begin_step(t)
        optimizer.zero_grad()
        found = method.training_step(batch, t)
        found["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        rows.setdefault("loss", []).append(found["loss"].detach())
        for who, network in networks.items():
            for i, layer in layers.items():
                for name, short in (("weight", "w"), ("bias", "b")):
                    value = getattr(layer(network), name).detach().clone()
                    rows.setdefault(f"{who}_{short}{i}", []).append(value)
    for name, values in rows.items():
        case.compare(name, torch.stack(values), TOLERANCE)


# --- co-training -----------------------------------------------------------------------------------------------------


@family("semisup", "cotraining_losses")
def cotraining_terms(case: Case) -> None:
    logits = {name: case.tensor(name, requires_grad=True) for name in case.inp}
    both = partial(_joined, logits)
    cot = cotraining.agreement(logits["f_unlabelled"], logits["g_unlabelled"])
    diff = cotraining.difference(both("f"), both("g"), both("f_adversarial_g"), both("g_adversarial_f"))
    (case.number("lambda_cot") * cot + case.number("lambda_diff") * diff).backward()
    case.compare("loss_cot", cot, TOLERANCE)
    case.compare("loss_diff", diff, TOLERANCE)
    for name, gradient in gradients(logits).items():
        case.compare(name, gradient, TOLERANCE)
    case.informative("cot_as_released")


def _joined(logits: dict[str, Tensor], who: str) -> Tensor:
    return torch.cat([logits[f"{who}_labelled"], logits[f"{who}_unlabelled"]])


@family("semisup", "cotraining_adversarial")
def adversarial_images(case: Case) -> None:
    weight, bias = case.tensor("weight"), case.tensor("bias")
    fooled = cotraining.adversarial(
        lambda x: x @ weight.T + bias, case.tensor("x"), case.tensor("labels"), case.number("epsilon")
    )
    case.compare("x", fooled, TOLERANCE)
