"""The numbers of the PixPro authors' code (contrast/models/PixPro.py of zdaxie/PixPro)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from selfsight.checkpoints.pixpro import from_official, official_names
from selfsight.contracts import Batch
from selfsight.losses.pixpro import instance_consistency, pixel_consistency, pixel_distances, positives
from selfsight.methods.pixpro import PixPro, pool, unit
from selfsight.nn.propagation import PixelPropagation
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Cosine, Warmup

from .harness import Case, family

LOOSE, EXACT = 1e-10, 1e-12


# --- propagation ---------------------------------------------------------------------------------------------------


def value_transform(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a value transform (names without ``vt.``) as `PixelPropagation` has them."""
    wrapped = {f"value_transform.{name}": value for name, value in tensors.items()}
    ours = from_official(wrapped | {"encoder_k.": torch.empty(0), "projector.linear1.weight": torch.empty(0)})
    return {k.removeprefix("propagation."): v for k, v in ours.items() if k.startswith("propagation.")}


def propagation(case: Case, channels: int, dtype: torch.dtype = torch.float64) -> PixelPropagation:
    module = PixelPropagation(
        channels, exponent=case.number("p"), clamp=case.number("clamp"), layers=case.number("layers")
    ).to(dtype)
    module.load_state_dict(module.state_dict() | value_transform(case.tensors("vt.", dtype)))
    return module


def compare_transform(case: Case, prefix: str, tensors: Mapping[str, Any], tolerance: float = LOOSE) -> None:
    """Compare outputs ``<prefix><authors' name>`` with tensors by our name."""
    theirs = official_names({f"propagation.{name}": value for name, value in tensors.items()})
    for name in case.out:
        if name.startswith(prefix):
            case.compare(name, theirs[f"value_transform.{name.removeprefix(prefix)}"], tolerance)


@family("pixpro", "ppm_")
def pixel_propagation(case: Case) -> None:
    single = case.inp["feat"].dtype == "float32"
    dtype = torch.float32 if single else torch.float64
    feat = case.tensor("feat", dtype, requires_grad=True)
    module = propagation(case, feat.shape[1], dtype).train(bool(case.number("bn_train")))
    y = module(feat)
    case.compare("y", y, 2e-5 if single else LOOSE)
    case.compare("y_norm", unit(y), 5e-6 if single else LOOSE)
    (unit(y) * case.tensor("cotangent", dtype)).sum().backward()
    loose = 5e-6 if single else LOOSE
    if "grad_feat" in case.out:
        case.compare("grad_feat", feat.grad, loose)
    compare_transform(case, "grad_vt.", {name: p.grad for name, p in module.named_parameters()}, loose)
    compare_transform(case, "vt_after.", dict(module.named_buffers()), loose)


# --- pairs and losses ----------------------------------------------------------------------------------------------


@family("pixpro", "mask_")
def pairs(case: Case) -> None:
    size = (case.number("H"), case.number("W"))
    q, k = case.tensor("coord_q"), case.tensor("coord_k")
    distances, diagonal = pixel_distances(q, k, size)
    A = positives(q, k, size, pos_ratio=case.number("pos_ratio"))
    case.compare("mask", A, 0)
    case.compare("n_pos", A.sum((1, 2)), 0)
    case.compare("max_bin_diag", diagonal, EXACT)
    if "dist" in case.out:
        case.compare("dist", distances, EXACT)
    back = positives(k, q, size, pos_ratio=case.number("pos_ratio"))
    assert torch.equal(A.transpose(1, 2), back), "the method takes one mask for both directions"


@family("pixpro", "loss_")
def consistency(case: Case) -> None:
    q = case.tensor("q", requires_grad=True)
    A = positives(
        case.tensor("coord_q"), case.tensor("coord_k"), (q.shape[2], q.shape[3]), pos_ratio=case.number("pos_ratio")
    )
    loss = pixel_consistency(q, case.tensor("k"), A)
    loss.backward()
    case.compare("n_pos", A.sum((1, 2)), 0)
    case.compare("loss", loss, LOOSE)
    case.compare("grad_q", q.grad, LOOSE)


class NoBackbone(nn.Module):
    """Stands where cases begin at feature maps."""

    num_features = 1

    def forward_features(self, x: Tensor) -> Tensor:
        return x


def build(backbone: nn.Module, **options: Any) -> PixPro:
    defaults = {
        "hidden_dim": 1, "dim": 1, "loss": "pixpro", "exponent": 2.0, "clamp": 0.0, "transform_layers": 1,
        "normalise_value": True, "pos_ratio": 0.7, "skip_empty": False, "temperature": 0.3, "instance_weight": 0.0,
        "decay": "kernels",
    }  # fmt: skip
    return PixPro(backbone, **(defaults | options))


@family("pixpro", "pixhead_")
def pixel_head(case: Case) -> None:
    x = [case.tensor(f"proj_{v}", requires_grad=True) for v in (1, 2)]
    k = [unit(case.tensor(f"proj_{v}_k")) for v in (1, 2)]
    method = build(NoBackbone())
    method.propagation = propagation(case, x[0].shape[1])
    c1, c2 = case.tensor("coord_1"), case.tensor("coord_2")
    A = positives(c1, c2, method.map_size(x), pos_ratio=case.number("pos_ratio"))
    q = [unit(method.propagation(m)) for m in x]
    losses = method.pixel_loss(q[0], k[1], A), method.pixel_loss(q[1], k[0], A.transpose(1, 2))
    sum(losses).backward()  # type: ignore[union-attr]
    case.compare("loss_12", losses[0], LOOSE)
    case.compare("loss_21", losses[1], LOOSE)
    case.compare("loss", sum(losses), LOOSE)
    for v in (1, 2):
        case.compare(f"grad_proj_{v}", x[v - 1].grad, LOOSE)
    compare_transform(case, "grad_vt.", {name: p.grad for name, p in method.propagation.named_parameters()})


HEADS = ("projector_instance.", "projector_instance_k.", "predictor.")


@family("pixpro", "instance")
def instance_branch(case: Case) -> None:
    weights = {name: tensor for name, tensor in case.tensors("").items() if name.startswith(HEADS)}
    hidden, width = weights["projector_instance.linear1.weight"].shape[:2]
    backbone = NoBackbone()
    backbone.num_features = width
    dim = len(weights["projector_instance.linear2.weight"])
    method = build(backbone, hidden_dim=hidden, dim=dim, instance_weight=1.0).double()
    extra = {"encoder_k.": torch.empty(0), "projector.linear1.weight": method.projector[0].weight.detach()}
    ours = from_official(weights | extra)
    method.load_state_dict(method.state_dict() | {k: v for k, v in ours.items() if "instance" in k})

    f = [case.tensor(f"feat_{v}", requires_grad=True) for v in (1, 2)]
    f_k = [case.tensor(f"feat_{v}_k") for v in (1, 2)]
    loss = method.instance_loss(f, f_k)
    loss.backward()
    case.compare("loss", loss, LOOSE)
    for v in (1, 2):
        case.compare(f"grad_feat_{v}", f[v - 1].grad, LOOSE)
        prediction = unit(pool(method.instance_predictor(method.instance_projector(f[v - 1]))))
        target = unit(pool(method.target_instance_projector(f_k[v - 1])))
        case.compare(f"pred_{v}", prediction, LOOSE)
        case.compare(f"target_{v}", target, LOOSE)
    a = [torch.from_numpy(case.out[f"pred_{v}"]) for v in (1, 2)]
    b = [torch.from_numpy(case.out[f"target_{v}"]) for v in (1, 2)]
    case.compare("loss", instance_consistency(a[0], b[1]) + instance_consistency(a[1], b[0]), LOOSE)


# --- whole steps ---------------------------------------------------------------------------------------------------


class ToyEncoder(nn.Module):
    """Two convolutions with BatchNorm and ReLU, as in the cases, in timm's interface."""

    def __init__(self, first: torch.Size, second: torch.Size) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(first[1], first[0], first[2], stride=first[2], bias=False)
        self.bn1 = nn.BatchNorm2d(first[0])
        self.conv2 = nn.Conv2d(second[1], second[0], second[2], padding=second[2] // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(second[0])
        self.num_features = second[0]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x)).relu()


def boxes_at(corners: Tensor) -> Tensor:
    """Boxes in an image of 2 x 2 pixels, where pixel and relative coordinates are the same."""
    x0, y0, x1, y1 = corners.unbind(-1)
    two, no = torch.full_like(x0, 2), torch.zeros_like(x0)
    return torch.stack([y0, x0, y1 - y0 + 1, x1 - x0 + 1, two, two, no, no], -1)


def toy(case: Case) -> PixPro:
    state = case.tensors("state.")
    hidden = len(state["projector.linear1.weight"])
    method = build(
        ToyEncoder(state["encoder.conv1.weight"].shape, state["encoder.conv2.weight"].shape),
        hidden_dim=hidden,
        dim=len(state["projector.linear2.weight"]),
        exponent=case.number("p"),
        clamp=case.number("clamp"),
        transform_layers=case.number("layers"),
        pos_ratio=case.number("pos_ratio"),
        instance_weight=case.number("ins_loss_weight"),
        decay="kernels" if case.number("use_lars") else "all",
    ).double()
    ours = from_official(state)
    found = method.load_state_dict(ours, strict=False)
    assert not found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    return method


@family("pixpro", "e2e_")
def end_to_end(case: Case) -> None:
    method = toy(case)
    B, n, epochs = case.number("batch"), case.number("n_iter_per_epoch"), case.number("epochs")
    options = {"momentum": case.number("sgd_momentum"), "weight_decay": case.number("weight_decay")}
    optimizer_class = partial(LARS, eps=1e-8, variant="torch") if case.number("use_lars") else torch.optim.SGD
    warmup, multiplier = case.number("warmup_epochs"), case.number("warmup_multiplier")
    peak, momentum = case.number("base_lr") * B / 256, Cosine(case.number("momentum_base"), 1.0)
    schedules = {
        "lr": Warmup(warmup, 1 / multiplier, Cosine(1.0, 1e-6 / peak)),
        # The authors count the momentum's steps from the number of images, the rate's from whole batches.
        "teacher_momentum": lambda step, clock: momentum(step, replace(clock, total=case.number("K"))),
    }
    recipe = OptimizationRecipe(partial(optimizer_class, **options), case.number("base_lr"), schedules, "linear")
    method.configure(recipe, Clock(n * B, B, epochs, n))
    optimizer = method.configure_optimizers()
    images = [case.tensor(f"im_{v}") for v in (1, 2)]
    places = [boxes_at(case.tensor(f"coord_{v}")) for v in (1, 2)]
    losses, rates, momenta = [], [], []
    gradients: dict[str, Any] = {}
    for step in range(len(images[0])):
        method.begin_step(step)
        optimizer.zero_grad()
        batch = Batch([view[step] for view in images], torch.arange(B), boxes=[box[step] for box in places])
        loss = method.training_step(batch, step)["loss"]
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        gradients = gradients or {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.end_step()
        losses.append(loss.detach())
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(method.scheduled["teacher_momentum"])
    case.compare("loss", torch.stack(losses), 1e-9)
    case.compare("lr", rates, 1e-9)
    case.compare("target_momentum", momenta, 1e-9)
    first, state = official_names(gradients), official_names(method.state_dict())
    for name in case.out:
        for prefix, found in (("grad0.", first), ("state.", state)):
            if name.startswith(prefix):
                case.compare(name, found[name.removeprefix(prefix)], 1e-9)


@family("pixpro", "r50_counts_", slow=True)
def counts(case: Case) -> None:
    method = build(
        timm.create_model("resnet50", num_classes=0),
        hidden_dim=4096,
        dim=256,
        transform_layers=case.number("layers"),
        instance_weight=case.number("ins_loss_weight"),
    )
    parameters = list(method.parameters())
    case.compare("n_state_keys", len(official_names(method.state_dict())), 0)
    case.compare("n_params_trainable", sum(p.numel() for p in parameters if p.requires_grad), 0)
    case.compare("n_params_total", sum(p.numel() for p in parameters), 0)
    groups = {bool(group["plain"]): len(group["params"]) for group in method.param_groups()}
    case.compare("n_lars_adapted_tensors", groups[False], 0)
    case.compare("n_lars_ignored_tensors", groups[True], 0)
