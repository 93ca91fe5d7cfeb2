"""The numbers of DINO's authors (facebookresearch/dino)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor, nn

from selfsight.backbones.vision_transformer import DINOViT
from selfsight.contracts import Batch
from selfsight.datamodules.views.image_ops import solarize
from selfsight.evaluation.probes.knn import neighbours, true_class_ranks
from selfsight.evaluation.probes.linear import top_accuracies
from selfsight.losses.dino import centred_softmax, dino, next_centre
from selfsight.methods.dino import DINO
from selfsight.nn.dino_head import DINOHead
from selfsight.nn.distributed import gather_without_grad
from selfsight.nn.ema import EMATeacher
from selfsight.nn.positions import resize_positions
from selfsight.nn.vit import class_attention, last_attention, last_tokens, mass_mask
from selfsight.optim.clipping import clip_each
from selfsight.optim.groups import split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Constant, Cosine, Schedule, Warmup

from .check_optim import Named, steps, trajectory
from .check_schedule import nested
from .harness import Case, family
from .networks import (
    NoBackbone,
    TinyResNet,
    compare_state,
    gradients,
    of_processes,
    one_epoch_steps,
    run_steps,
    stacked,
    tiny_vit,
)

TOLERANCE = 1e-9


# --- head and first weights ------------------------------------------------------------------------------------------


def head_of(case: Case) -> DINOHead:
    sizes = {name: case.number(name) for name in ("hidden_dim", "bottleneck_dim")}
    flags = {ours: bool(case.number(theirs)) for ours, theirs in HEAD_FLAGS.items() if theirs in case.hp}
    layers = max(1, case.number("nlayers")) if "nlayers" in case.hp else 3
    return DINOHead(case.number("in_dim"), case.number("out_dim"), layers=layers, **sizes, **flags)


HEAD_FLAGS = {"norm": "use_bn", "norm_last_layer": "norm_last_layer"}


def mlp_name(name: str) -> str:
    """A single layer has no number in the authors' head."""
    return name.replace("mlp.0.", "mlp.")


@family("dino", "head_")
def head(case: Case) -> None:
    ours = head_of(case).double().train(bool(case.number("training")))
    theirs = mlp_name if case.number("nlayers") <= 1 else str
    recorded = case.tensors("sd__")
    ours.load_state_dict({name: recorded[theirs(name)] for name in ours.state_dict()})
    x = case.tensor("x", requires_grad=True)
    y = ours(x)
    (y * case.tensor("upstream")).sum().backward()
    case.compare("y", y, TOLERANCE)
    case.compare("dx", x.grad, TOLERANCE)
    found = {theirs(name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(found) == {name.removeprefix("grad__") for name in case.out if name.startswith("grad__")}
    compare_state(case, "grad__", found, TOLERANCE)
    compare_state(case, "buf__", ours.state_dict(), TOLERANCE)


def compare_first_weights(case: Case, make: Callable[[], nn.Module], name_of: Callable[[str], str] = str) -> None:
    """Spread of every tensor over several fresh networks; what is all 0 or all 1 has to be so exactly."""
    torch.manual_seed(0)
    models = [make().state_dict() for _ in range(case.number("models"))]
    names = case.out["names"].tolist()
    case.compare("names", np.array([name for name in names if name_of(name) in models[0]]), 0)
    pooled = [torch.stack([model[name_of(name)].double() for model in models]) for name in names]
    spread, recorded = np.array([float(p.std(correction=0)) for p in pooled]), case.out["std"]
    near = np.abs(spread - recorded) <= np.where(recorded == 0, 0, np.maximum(0.05 * recorded, 0.004))
    case.compare("std", np.where(near, recorded, spread), 0)
    case.compare("mean", [float(p.mean()) for p in pooled], 0, where=(recorded == 0))
    case.informative("absmax", "mean")


@family("dino", "init_")
def first_weights(case: Case) -> None:
    if case.number("kind") == "head":
        compare_first_weights(case, lambda: head_of(case))
    else:
        sizes = case.number("img"), case.number("patch"), case.number("dim"), 1, case.number("heads")
        compare_first_weights(case, lambda: tiny_vit(*sizes, DINOViT))


# --- loss ------------------------------------------------------------------------------------------------------------


def warmed_temperature(case: Case) -> Warmup:
    last = Constant(case.number("teacher_temp"))
    first = case.number("warmup_teacher_temp")
    return Warmup(case.number("warmup_teacher_temp_epochs"), first, last, ends="both", per="epoch")


def losses(case: Case, student: Tensor, teacher: Tensor, centre: Tensor, epoch: int) -> dict[str, Tensor]:
    epochs = case.number("nepochs")
    T = warmed_temperature(case)(epoch, one_epoch_steps(1, epochs))
    M = case.number("ncrops")
    student = student.clone().requires_grad_()
    s, t = student.unflatten(0, (M, -1)), teacher.unflatten(0, (2, -1))
    targets = centred_softmax(t, centre, temperature=T)
    loss = dino(s, targets, temperature=case.number("student_temp"))
    loss.backward()
    centre = next_centre(centre, gather_without_grad(t.flatten(0, 1)), momentum=case.number("center_momentum"))
    found = {"loss": loss.detach(), "center": centre, "teacher_temp": torch.tensor(T, dtype=torch.float64)}
    return found | gradients({"student": student})


@family("dino", "loss_")
def loss(case: Case) -> None:
    arrays = (case.tensor(name) for name in ("student", "teacher", "center"))
    student, teacher, centre = arrays
    for name, value in losses(case, student, teacher, centre[0], case.number("epoch")).items():
        case.compare(name, value[None] if name == "center" else value, TOLERANCE)


def losses_on(rank: int, case: Case) -> dict[str, Tensor]:
    student, teacher = (case.tensor(name)[rank] for name in ("student", "teacher"))
    return losses(case, student, teacher, case.tensor("center")[0], case.number("epoch"))


@family("dino", "loss_#rank", slow=True)
def loss_on_processes(case: Case) -> None:
    ranks = of_processes(case, losses_on)
    for found in ranks:
        case.compare("center", found["center"][None], TOLERANCE)
    for name in ("loss", "grad_student"):
        case.compare(name, torch.stack([found[name] for found in ranks]), TOLERANCE)


@family("dino", "lossseq_")
def loss_over_epochs(case: Case) -> None:
    student, teacher, n = case.tensor("student"), case.tensor("teacher"), case.number("steps_per_epoch")
    centre, values, centres = torch.zeros(student.shape[-1], dtype=torch.float64), [], []
    for step in range(len(student)):
        found = losses(case, student[step], teacher[step], centre, step // n)
        centre = found["center"]
        values.append(found["loss"])
        centres.append(centre)
    case.compare("loss", torch.stack(values), TOLERANCE)
    case.compare("center", torch.stack(centres), TOLERANCE)


# --- schedules, average, gradients, groups, optimiser ----------------------------------------------------------------


@family("dino", "temp_")
def temperatures(case: Case) -> None:
    epochs, schedule = case.number("nepochs"), warmed_temperature(case)
    clock = one_epoch_steps(3, epochs)
    case.compare("temperature", [schedule(3 * epoch, clock) for epoch in range(epochs)], TOLERANCE)
    assert all(schedule(3 * epoch, clock) == schedule(3 * epoch + 2, clock) for epoch in range(epochs))


@family("dino", "sched_")
def schedules(case: Case) -> None:
    clock = one_epoch_steps(case.number("niter_per_ep"), case.number("epochs"))
    schedule: Schedule = Cosine(case.number("base_value"), case.number("final_value"))
    schedule = Warmup(case.number("warmup_epochs"), case.number("start_warmup_value"), schedule, ends="both")
    case.compare("value", [schedule(int(step), clock) for step in case.inp["iteration"]], TOLERANCE)
    case.compare("total", clock.total_steps, 0)


@family("dino", "ema_")
def average(case: Case) -> None:
    teacher = EMATeacher(nested(case.tensors("teacher__")), buffers="keep")
    students, clock = case.tensors("student__"), one_epoch_steps(case.number("niter_per_ep"), case.number("epochs"))
    momentum = [Cosine(case.number("momentum_teacher"), 1.0)(step, clock) for step in range(case.number("steps"))]
    found = []
    for step, m in enumerate(momentum):
        teacher.update(nested({name: value[step] for name, value in students.items()}), m)
        found.append({name: value.clone() for name, value in teacher.module.state_dict().items()})
    case.compare("momentum", momentum, TOLERANCE)
    compare_state(case, "teacher__", {n: torch.stack([state[n] for state in found]) for n in found[0]}, TOLERANCE)


@family("dino", "clip_")
def clipping(case: Case) -> None:
    recorded = case.tensors("grad__")
    model = nested({name: torch.zeros_like(value) for name, value in recorded.items()})
    names = case.out["names"].tolist()
    for name in names:
        model.get_parameter(name).grad = recorded[name].clone()
    case.compare("names", np.array(names), 0)
    case.compare("norms", clip_each([model.get_parameter(name) for name in names], case.number("clip")), TOLERANCE)
    compare_state(case, "grad__", {name: model.get_parameter(name).grad for name in names}, TOLERANCE)


@family("dino", "cancel_")
def frozen_last_layer(case: Case) -> None:
    sizes: dict[str, Any] = {"out_dim": 3, "hidden_dim": 2, "bottleneck_dim": 2, "norm_last_layer": False}
    method = DINO(NoBackbone(2), freeze_last_layer_epochs=case.number("freeze_last_layer"), clip_grad=0.0, **sizes)
    method.backbone = nested(
        {n.removeprefix("backbone."): torch.zeros(1) for n in case.inp["names"].tolist() if n.startswith("backbone.")}
    )
    parameters, rows = dict(method.named_parameters()), []
    for epoch in range(case.number("epochs")):
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        method.step = epoch
        method.on_before_optimizer_step(None)  # type: ignore[arg-type]
        rows.append([int(parameters[name].grad is not None) for name in case.inp["names"].tolist()])
    case.compare("has_gradient", rows, 0)


@family("dino", "groups_")
def groups(case: Case) -> None:
    names = case.inp["names"].tolist()
    model = nested({name: torch.zeros([1] * n) for name, n in zip(names, case.inp["ndim"].tolist(), strict=True)})
    for name, wanted in zip(names, case.inp["requires_grad"].tolist(), strict=True):
        model.get_parameter(name).requires_grad_(bool(wanted))
    group_of = {id(p): group for group in split_no_decay(model, decay_places=True) for p in group["params"]}
    found = [group_of.get(id(model.get_parameter(name))) for name in names]
    case.compare("group", [-1 if group is None else int(group["plain"]) for group in found], 0)
    (plain,) = {group["weight_decay"] for group in found if group is not None and group["plain"]}
    case.compare("second_group_weight_decay", plain, 0)


@family("dino", "lars_")
def lars(case: Case) -> None:
    model = Named(case.tensors("param__"))
    optimizer = LARS(
        split_no_decay(model), lr=0.0, momentum=case.number("momentum"), weight_decay=case.number("weight_decay"),
        trust_coefficient=case.number("eta"), variant="torch",
    )  # fmt: skip
    recorded = steps(case.tensors("grad__"))
    for gradient in recorded[: case.number("frozen_steps")]:
        del gradient["frozen"]
    got = list(trajectory(model, optimizer, recorded, case.inp["lr"].tolist()))
    compare_state(case, "param__", {name: np.stack([after[name] for after in got]) for name in got[0]}, TOLERANCE)


# --- transformer -----------------------------------------------------------------------------------------------------


def vit_of(case: Case, **options: Any) -> DINOViT:
    sizes = [case.number(name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")]
    chosen = {name: case.number(name) for name in ("eps", "mlp_ratio") if name in case.hp}
    vit = tiny_vit(*sizes, DINOViT, dynamic_img_size=True, **chosen, **options).double()
    vit.load_state_dict(case.tensors("sd__"))
    assert isinstance(vit, DINOViT)
    return vit


@family("dino", "vit_")
def transformer(case: Case) -> None:
    vit, x = vit_of(case), case.tensor("x", requires_grad=True)
    feature = vit(x)
    (feature * case.tensor("upstream")).sum().backward()
    case.compare("feature", feature, TOLERANCE)
    case.compare("dx", x.grad, TOLERANCE)
    compare_state(case, "grad__", {name: p.grad for name, p in vit.named_parameters()}, TOLERANCE)
    n = case.number("n")
    layers = vit.get_intermediate_layers(x, n=n, norm=True, return_prefix_tokens=True)
    tokens = torch.stack([torch.cat([prefix, patches], 1) for patches, prefix in layers])
    case.compare("intermediate", tokens, TOLERANCE)
    torch.testing.assert_close(last_tokens(vit, x, n), torch.cat(list(tokens[:, :, 0]), dim=1))
    case.compare("attention", last_attention(vit, x), TOLERANCE)


@family("dino", "posinterp_")
def positions(case: Case) -> None:
    table = case.tensor("pos_embed", requires_grad=True)
    size = case.number("height"), case.number("width")
    resized = resize_positions(table, size, case.number("patch_size"), rule="dino")
    (resized * case.tensor("upstream")).sum().backward()
    case.compare("pos_embed", resized, TOLERANCE)
    case.compare("grad_pos_embed", table.grad, TOLERANCE)


@family("dino", "linfeat_")
def features_of_the_probe(case: Case) -> None:
    vit = vit_of(case).eval()
    found = last_tokens(vit, case.tensor("x"), case.number("n_last_blocks"), average=bool(case.number("avgpool")))
    case.compare("feature", found, TOLERANCE)


@family("dino", "attention_")
def attention_maps(case: Case) -> None:
    vit, p = vit_of(case), case.number("patch_size")
    image = case.tensor("image")
    h, w = (side // p for side in image.shape[-2:])
    attention = class_attention(last_attention(vit, image[None, :, : h * p, : w * p]), vit.num_prefix_tokens, (h, w))[0]
    mask = mass_mask(attention, case.number("threshold"))

    def enlarged(maps: Tensor) -> Tensor:
        return F.interpolate(maps[None], scale_factor=p, mode="nearest")[0]

    case.compare("map", enlarged(attention), TOLERANCE)
    case.compare("mask", enlarged(mask.double()), 0)


@family("dino", "droppath_")
def stochastic_depth(case: Case) -> None:
    """timm's drop path, its coins thrown as recorded; and how the rates grow over the blocks."""
    noise, x, p = case.tensor("noise"), case.tensor("x"), case.number("drop_prob")
    throw = Tensor.bernoulli_
    Tensor.bernoulli_ = lambda self, keep: self.copy_((noise >= 1 - keep).to(self).view(self.shape))  # type: ignore[assignment, method-assign]
    try:
        case.compare("y", drop_path(x, p, training=True), TOLERANCE)
    finally:
        Tensor.bernoulli_ = throw  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)  # which timm counts the rates in
    try:
        vit = tiny_vit(8, 4, 4, case.number("depth"), 1, DINOViT, drop_path_rate=case.number("drop_path_rate"))
    finally:
        torch.set_default_dtype(torch.float32)
    case.compare("rates", [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks], TOLERANCE)
    teacher = DINO(vit, out_dim=2, hidden_dim=2, bottleneck_dim=2).teacher
    assert all(getattr(m, "drop_prob", 0.0) == 0 for m in teacher.modules()), "the teacher drops nothing"
    assert any(getattr(m, "drop_prob", 0.0) > 0 for m in vit.modules()), "the student does"


# --- measurements, views ---------------------------------------------------------------------------------------------


@family("dino", "knn_")
def nearest_neighbours(case: Case) -> None:
    k, classes = case.number("k"), case.number("num_classes")
    similarity, index = neighbours(case.tensor("test"), case.tensor("train"), k, backend="torch")
    voters = case.tensor("train_labels")[index]
    labels = case.tensor("test_labels")
    ranks = true_class_ranks(similarity, voters, labels, [k], case.number("temperature"), classes)[k]
    case.compare("top1", 100 * (ranks < 1).double().mean(), TOLERANCE)
    case.compare("top5", 100 * (ranks < min(5, k)).double().mean(), TOLERANCE)


@family("dino", "linprobe_")
def linear_probe(case: Case) -> None:
    x, y, n = case.tensor("x"), case.tensor("y"), case.number("iterations")
    layer = nn.Linear(x.shape[-1], len(case.inp["bias"])).double()
    layer.load_state_dict({"weight": case.tensor("weight"), "bias": case.tensor("bias")})
    recipe = OptimizationRecipe(
        partial(torch.optim.SGD, momentum=0.9), case.number("base_lr"), {"lr": Cosine(1.0, 0.0, per="epoch")}, "linear"
    )
    clock = Clock(n, case.number("batch_size"), case.number("epochs"), n)
    optimizer = recipe.build([{"params": list(layer.parameters())}], clock)
    rows: dict[str, list[float]] = {name: [] for name in ("lr", "train_loss", "val_loss", "val_acc1", "val_acc5")}
    for epoch in range(case.number("epochs")):
        losses = []
        for step in range(epoch * n, (epoch + 1) * n):
            recipe.apply(optimizer, recipe.values(step, clock))
            loss = F.cross_entropy(layer(x[step]), y[step])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        logits = layer(case.tensor("x_val"))
        top = top_accuracies(logits, case.tensor("y_val"))
        values = (
            optimizer.param_groups[0]["lr"], float(np.mean(losses)),
            F.cross_entropy(logits, case.tensor("y_val")).item(), 100 * top["top1"], 100 * top["top5"],
        )  # fmt: skip
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    for name, found in rows.items():
        case.compare(name, found, 1e-6 if "acc" in name else TOLERANCE)
    case.compare("weight", layer.weight, TOLERANCE)
    case.compare("bias", layer.bias, TOLERANCE)


@family("dino", "solarize_")
def solarized(case: Case) -> None:
    image = case.tensor("image").permute(2, 0, 1)[None] / 255
    changed = solarize(image, torch.tensor([True]))
    case.compare("image", (changed[0].permute(1, 2, 0) * 255).round().long(), 0)


# --- whole network, whole steps --------------------------------------------------------------------------------------


def backbone_of(case: Case) -> nn.Module:
    if case.number("arch") == "resnet":
        return TinyResNet(case.number("widths"))
    sizes = [case.number(name) for name in ("img", "patch", "dim", "depth", "heads")]
    return tiny_vit(*sizes, DINOViT, dynamic_img_size=True)


def method_of(case: Case, **options: Any) -> DINO:
    sizes = {ours: case.number(ours) if ours in case.hp else plain for ours, plain in SIZES.items()}
    flags: dict[str, Any] = {
        ours: bool(case.number(theirs))
        for ours, theirs in {"head_norm": "use_bn", "norm_last_layer": "norm_last_layer"}.items()
        if theirs in case.hp
    }
    layers = {"head_layers": case.number("nlayers")} if "nlayers" in case.hp else {}
    method = DINO(backbone_of(case), out_dim=case.number("out_dim"), **sizes, **flags, **layers, **options).double()
    recorded = case.tensors("sd__")
    for network in (method.student, method.teacher.module):
        network.load_state_dict(recorded)
    return method


SIZES = {"hidden_dim": 16, "bottleneck_dim": 8}


@family("dino", "multicrop_")
def several_sizes(case: Case) -> None:
    method, calls = method_of(case), []
    method.backbone.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    crops = [case.tensor(f"crop{i}") for i in range(len(case.number("sizes")))]
    y = method.scores(method.student, crops)
    case.compare("y", y.flatten(0, 1), TOLERANCE)
    case.compare("calls", calls, 0)
    compare_state(case, "buf__", method.student.state_dict(), TOLERANCE)


def train(case: Case, crops: list[Tensor]) -> dict[str, Tensor]:
    """The loop on one process: crops ``[T, B, 3, s, s]`` of each view."""
    n, epochs = case.number("iters_per_epoch"), case.number("epochs")
    W = case.number("world_size") if "world_size" in case.hp else 1
    method = method_of(
        case, student_temperature=case.number("student_temp"), centre_momentum=case.number("center_momentum"),
        freeze_last_layer_epochs=case.number("freeze_last_layer"), clip_grad=case.number("clip_grad"),
    )  # fmt: skip
    optimizer: Any = {
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=0.9),
        "lars": partial(LARS, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, variant="torch"),
    }[case.number("optimizer")]
    clock = one_epoch_steps(n, epochs, W * case.number("batch_size"))
    lr = case.number("lr")
    peak = OptimizationRecipe(optimizer, lr, scaling="linear").peak_lr(clock.batch_size)
    warmup = case.number("warmup_epochs")
    schedules: dict[str, Schedule] = {
        "lr": Warmup(warmup, 0.0, Cosine(1.0, case.number("min_lr") / peak), ends="both"),
        "weight_decay": Cosine(case.number("weight_decay"), case.number("weight_decay_end")),
        "teacher_momentum": Cosine(case.number("momentum_teacher"), 1.0),
        "teacher_temperature": warmed_temperature(case),
    }
    recorded: dict[str, list[Any]] = {}

    def record(step: int, found: dict[str, Tensor]) -> None:
        student, teacher = method.student, method.teacher.module
        values = {
            "center": method.centre.clone(), "student_norm": length(student), "teacher_norm": length(teacher),
            "lr": method.scheduled["lr"], "weight_decay": method.scheduled["weight_decay"],
            "momentum": method.scheduled["teacher_momentum"],
        }  # fmt: skip
        for name, value in values.items():
            recorded.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64))
        if step == 0:
            first.update({f"first__{n}": p.clone() for n, p in student.state_dict().items()})

    def batches() -> Iterator[Batch]:
        for views in zip(*crops, strict=True):
            yield Batch(list(views), torch.arange(len(views[0])))

    first: dict[str, Tensor] = {}
    found, _ = run_steps(method, OptimizationRecipe(optimizer, lr, schedules, "linear"), clock, batches(), after=record)
    ends = {"student__": method.student, "teacher__": method.teacher.module}
    states = {prefix + name: value for prefix, net in ends.items() for name, value in net.state_dict().items()}
    return {"loss": stacked(found, "loss"), **{n: torch.stack(v) for n, v in recorded.items()}, **first, **states}


def length(network: nn.Module) -> Tensor:
    """L2 norm of all parameters."""
    return torch.cat([p.detach().flatten() for p in network.parameters()]).norm()


def crops_of(case: Case) -> list[Tensor]:
    return [case.tensor(f"crop{i}") for i in range(2 + case.number("local_crops_number"))]


@family("dino", "steps_")
def training(case: Case) -> None:
    found = train(case, crops_of(case))
    for name in case.out:
        case.compare(name, found[name], 1e-7)


def train_on(rank: int, case: Case) -> dict[str, Tensor]:
    return train(case, [crop[rank] for crop in crops_of(case)])


@family("dino", "steps_#rank", slow=True)
def training_on_processes(case: Case) -> None:
    ranks = of_processes(case, train_on)
    case.compare("loss", torch.stack([found["loss"] for found in ranks]), 1e-7)
    for found in ranks:
        for name in case.out:
            if name != "loss":
                case.compare(name, found[name], 1e-7)
