"""Learning rates, weight decay and momenta step by step, and the counts of steps they rest on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from selfsight.nn.ema import EMATeacher
from selfsight.nn.queue import queue_length
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import (
    Clock,
    Constant,
    Cosine,
    CosineArc,
    Milestones,
    Schedule,
    Table,
    Warmup,
    iterations_in,
    iterations_per_epoch,
    teacher_momentum,
)

from .harness import Case, compare, family


def rates(schedule: Schedule, clock: Clock, steps: Any, *, lr: float, scaling: str = "none") -> np.ndarray:
    recipe = OptimizationRecipe(torch.optim.SGD, lr=lr, schedules={"lr": schedule}, scaling=scaling)
    return np.array([recipe.values(int(step), clock)["lr"] for step in steps])


def compare_in_units(case: Case, name: str, got: np.ndarray, unit: Any, tolerance: float) -> None:
    """The error as a multiple of ``unit`` (a peak, or the recorded values themselves)."""
    case.compared.add(name)
    compare(got / unit, case.out[name] / unit, tolerance, label=f"{case.file}/{case.name}: {name}")


def epochs_of(steps_per_epoch: int, epochs: int) -> Clock:
    return Clock(examples=1, batch_size=1, epochs=epochs, steps_per_epoch=steps_per_epoch)


@family("simclrv2", "lr_", "lr_tf2_")
def simclr_lr(case: Case) -> None:
    clock = Clock(
        examples=case.number("num_examples"),
        batch_size=case.number("batch_size"),
        epochs=case.number("epochs"),
        steps_per_epoch=case.number("num_examples") // case.number("batch_size"),
        total=case.number("train_steps") or None,
        batches_cross_epochs=True,
    )
    schedule = Warmup(case.number("warmup_epochs"), start=0.0, then=Cosine(1.0, 0.0))
    scaling = "sqrt" if case.number("sqrt_scaling") else "linear"
    lr = case.number("learning_rate")
    peak = OptimizationRecipe(torch.optim.SGD, lr=lr, scaling=scaling).peak_lr(clock.batch_size)
    got = rates(schedule, clock, case.inp["steps"], lr=lr, scaling=scaling)
    compare_in_units(case, "lr", got, peak, 2e-6)
    if "total_steps" in case.out:
        case.compare("total_steps", clock.total_steps, 0)
        case.compare("warmup_steps", clock.steps(case.number("warmup_epochs")), 0)


@family("swav", "lr_")
def swav_lr(case: Case) -> None:
    base, clock = case.number("base_lr"), epochs_of(case.number("iters_per_epoch"), case.number("epochs"))
    cosine = Cosine(1.0, case.number("final_lr") / base)
    schedule = Warmup(case.number("warmup_epochs"), case.number("start_warmup") / base, cosine, ends="both")
    steps = case.inp.get("iteration", range(clock.total_steps))
    case.compare("lr", rates(schedule, clock, steps, lr=base), 1e-9)
    if "total" in case.out:
        case.compare("total", clock.total_steps, 0)


@family("swav", "lr_linear_eval")
def swav_lr_linear(case: Case) -> None:
    clock = epochs_of(1, case.number("epochs"))
    columns = [
        rates(Cosine(1.0, case.number("final") / lr, per="epoch"), clock, range(clock.total_steps), lr=lr)
        for lr in case.number("lr")
    ]
    case.compare("lr", np.stack(columns, 1), 1e-9)


@family("swav", "lr_semisup")
def swav_lr_semisup(case: Case) -> None:
    clock = epochs_of(1, case.number("epochs"))
    schedule = Milestones(1.0, case.number("gamma"), case.number("milestones"))
    columns = [rates(schedule, clock, range(clock.total_steps), lr=lr) for lr in case.number("lr")]
    case.compare("lr", np.stack(columns, 1), 1e-9)


@family("swav", "iters_per_epoch")
def swav_iterations(case: Case) -> None:
    case.compare("iters", [iterations_per_epoch(*row) for row in case.inp["images_world_batch"].tolist()], 0)


@family("swav", "queue_length")
def swav_queue_length(case: Case) -> None:
    case.compare("global_local", [queue_length(*row) for row in case.inp["length_batch_world"].tolist()], 0)


@family("pixpro", "lr_")
def pixpro_lr(case: Case) -> None:
    clock = epochs_of(case.number("n_iter_per_epoch"), case.number("epochs"))
    batch = case.number("batch_per_gpu") * case.number("world_size")
    recipe = OptimizationRecipe(torch.optim.SGD, lr=case.number("base_lr"), scaling="linear")
    peak = recipe.peak_lr(batch)
    then: Schedule = Cosine(1.0, case.number("eta_min") / peak)
    if case.number("is_step"):
        then = Milestones(1.0, case.number("decay_rate"), case.inp["decay_epochs"].tolist())
    schedule = Warmup(case.number("warmup_epochs"), 1 / case.number("warmup_multiplier"), then)
    compare_in_units(case, "lr", rates(schedule, clock, case.inp["iter"], lr=peak), case.out["lr"], 1e-12)


@family("pixpro", "ema_")
def pixpro_ema(case: Case) -> None:
    sizes = (case.number("num_instances"), case.number("world_size"), case.number("batch_per_gpu"))
    total = iterations_in(case.number("epochs"), *sizes)
    case.compare("K", total, 0)
    case.compare("k_start", iterations_in(case.number("start_epoch") - 1, *sizes), 0)
    clock = Clock(examples=1, batch_size=1, epochs=1, steps_per_epoch=1, total=total)
    momentum = Cosine(case.number("base_momentum"), 1.0)
    case.compare("momentum", [momentum(int(k), clock) for k in case.inp["k"]], 1e-13)


@family("supcon", "lr_")
def supcon_lr(case: Case) -> None:
    lr, decay = case.number("learning_rate"), case.number("lr_decay_rate")
    n, epochs = case.number("batches_per_epoch"), case.number("epochs")
    schedule: Schedule = Milestones(1.0, decay, case.number("lr_decay_epochs"))
    if case.number("cosine"):
        schedule = Cosine(1.0, decay**3, per="epoch", ends="right")
    if case.number("warm"):
        schedule = Warmup(case.number("warm_epochs"), case.number("warmup_from") / lr, schedule, overlap=True)
    clock = epochs_of(n, epochs)
    steps = [epoch * n + batch for epoch in range(epochs) for batch in (0, n // 2, n - 1)]
    got = rates(schedule, clock, steps, lr=lr).reshape(epochs, 3)
    compare_in_units(case, "lr_first_mid_last", got, case.out["lr_first_mid_last"], 1e-12)


@family("rotation", "lr_")
def rotation_lr(case: Case) -> None:
    clock = epochs_of(3, case.number("epochs"))
    table = Table(case.number("lut"))
    case.compare("lr", rates(table, clock, range(0, clock.total_steps, 3), lr=1.0), 1e-9)


def spark_recipe(case: Case, optimizer: Callable[..., Any]) -> tuple[OptimizationRecipe, Clock]:
    """SparK's schedules; one step an epoch, so that a warm-up given in steps can be given in epochs."""
    lr: Schedule = Warmup(case.number("wp_it"), 0.005, Cosine(1.0, 0.001, ends="both"))
    decay: Schedule = Constant(case.number("wd"))
    if "wde" in case.hp:
        decay = Cosine(case.number("wd"), case.number("wde"), ends="both")
    recipe = OptimizationRecipe(optimizer, lr=case.number("peak_lr"), schedules={"lr": lr, "weight_decay": decay})
    return recipe, epochs_of(1, case.number("max_it"))


@family("spark", "sched_", "ftsched")
def spark_schedule(case: Case) -> None:
    recipe, clock = spark_recipe(case, torch.optim.SGD)
    scale = 0.7**5 if case.name.startswith("ftsched") else 0.7**3
    kernel, plain = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [kernel]}, {"params": [plain], "plain": True, "weight_decay": 0.0, "lr_scale": scale}]
    optimizer = recipe.build(groups, clock)
    rows = []
    for step in case.inp.get("it", range(clock.total_steps)):
        recipe.apply(optimizer, recipe.values(int(step), clock))
        values = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        lr, decay = zip(*values, strict=True)
        rows.append([*values[0], *values[1], min(lr), max(lr), min(decay), max(decay)])
    case.compare("cols_lr0_wd0_lr1_wd1_minlr_maxlr_minwd_maxwd", rows, 1e-12, scale="each")


@family("simmatchv2", "sched_")
def simmatch_schedule(case: Case) -> None:
    clock = epochs_of(case.number("iters_per_epoch"), case.number("epochs"))
    then: Schedule = Milestones(1.0, 0.1, case.number("schedule"))
    if case.number("cos"):
        then = Cosine(1.0, 0.0, per="epoch")
    schedule = Warmup(case.number("warmup_epoch"), 0.0, then, ends="right")
    steps = range(clock.total_steps)
    case.compare("lr_per_iter", rates(schedule, clock, steps, lr=case.number("lr")), 1e-9, scale="each")
    momentum = teacher_momentum(case.number("ema_m"))
    case.compare("ema_m_per_iter", [momentum(step, clock) for step in steps], 1e-9, scale="each")


@family("simmatchv2", "usb_cosine_lr")
def usb_cosine(case: Case) -> None:
    clock = epochs_of(1, case.number("num_train_iter"))
    schedule = Warmup(case.number("num_warmup_iter"), 0.0, CosineArc(7 / 16))
    case.compare("lr", rates(schedule, clock, range(clock.total_steps), lr=case.number("lr")), 1e-9, scale="each")


def nested(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module tree with these tensors: running statistics and counters as buffers, the rest as parameters."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if leaf.startswith("running_") or leaf == "num_batches_tracked":
            module.register_buffer(leaf, value.clone())
        else:
            module.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


@family("simmatchv2", "ema_")
def simmatch_ema(case: Case) -> None:
    teacher = EMATeacher(nested(case.tensors("ema.")), buffers="ema" if case.number("eman") else "keep")
    student = nested(case.tensors("main."))
    for m in case.number("m"):
        teacher.update(student, m)
    for name, value in teacher.module.state_dict().items():
        case.compare(f"ema.{name}", value, 1e-9, scale="each")


@family("simmatchv2", "usb_ema")
def usb_ema(case: Case) -> None:
    count = len({name.split(".", 1)[0] for name in case.inp})
    students = [nested(case.tensors(f"net{i}.")) for i in range(count)]
    teacher = EMATeacher(students[0], momentum=case.number("decay"), buffers="copy")
    for student in students[1:]:
        teacher.update(student)
    for name, value in teacher.module.state_dict().items():
        case.compare(f"shadow.{name}", value, 1e-9, scale="each")
