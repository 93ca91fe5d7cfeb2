"""The numbers of BYOL's authors (google-deepmind/deepmind-research, byol)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from selfsight.backbones.byol_resnet import SamePaddingResNet
from selfsight.contracts import Batch
from selfsight.losses.byol import byol, distances
from selfsight.methods.byol import BYOL
from selfsight.nn.ema import EMATeacher
from selfsight.optim.groups import all_parameters, split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Cosine, Warmup

from .harness import Case, family
from .networks import (
    NoBackbone,
    compare_state,
    lars_trajectory,
    one_epoch_steps,
    renamed,
    run_steps,
    stacked,
)  # fmt: skip

TOLERANCE = 1e-9
MEAN, STD = (
    torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


@family("byol", "loss_")
def loss(case: Case) -> None:
    p = [case.tensor(name, requires_grad=True) for name in ("p1", "p2")]
    z = [case.tensor(name, requires_grad=True) for name in ("z1", "z2")]
    value = byol(*p, *z)
    value.backward()
    assert z[0].grad is None, "targets get no gradient"
    case.compare("loss", value, TOLERANCE)
    case.compare("rows_p1_z2", distances(p[0], z[1]), TOLERANCE)
    case.compare("rows_p2_z1", distances(p[1], z[0]), TOLERANCE)
    for i in (0, 1):
        case.compare(f"grad_p{i + 1}", p[i].grad, TOLERANCE)


@family("byol", "tau_")
def momentum(case: Case) -> None:
    clock, tau = one_epoch_steps(1, case.number("max_steps")), Cosine(case.number("base_ema"), 1.0)
    case.compare("tau", [tau(int(step), clock) for step in case.inp["step"]], 1e-12)


@family("byol", "lr_")
def learning_rate(case: Case) -> None:
    clock = one_epoch_steps(1, case.number("total_steps"), case.number("batch_size"))
    recipe = OptimizationRecipe(
        torch.optim.SGD, case.number("base_learning_rate"), {"lr": warmed(case.number("warmup_steps"))}, "linear"
    )
    case.compare("lr", [recipe.values(int(step), clock)["lr"] for step in case.inp["step"]], 1e-12)


def warmed(steps: int) -> Warmup:
    return Warmup(steps, 0.0, Cosine(1.0, 0.0))


@family("byol", "mlp_")
def head(case: Case) -> None:
    """The projector and the predictor have one form."""
    method = BYOL(NoBackbone(case.number("in_dim")), hidden_dim=case.number("hidden"), dim=case.number("out_dim"))
    assert {m.eps for m in method.modules() if isinstance(m, nn.BatchNorm1d)} == {case.number("bn_eps")}
    method.double().load_state_dict(method.state_dict() | case.tensors("sd__"))
    x = case.tensor("x", requires_grad=True)
    y = method.projector(x)
    (y * case.tensor("upstream")).sum().backward()
    case.compare("y", y, TOLERANCE)
    case.compare("grad_x", x.grad, TOLERANCE)
    compare_state(case, "grad__", {name: p.grad for name, p in method.named_parameters()}, TOLERANCE)
    case.informative(*(name for name in case.out if name.startswith("haiku__")))


@family("byol", "lars_")
def lars(case: Case) -> None:
    groups = split_no_decay if case.number("exclude_bias_and_norm") else all_parameters
    lars_trajectory(case, groups, trust_coefficient=case.number("eta"))


@family("byol", "resnet_")
def resnet(case: Case) -> None:
    block = Bottleneck if case.number("bottleneck") else BasicBlock
    net = SamePaddingResNet(block, case.number("blocks"), num_classes=0, channels=case.number("channels"))
    assert net.conv1.out_channels == case.number("stem_channels")
    net.double().load_state_dict(net.state_dict() | {torch_name(n): v for n, v in case.tensors("sd__").items()})
    case.compare("feature", net(case.tensor("x")), TOLERANCE)


def torch_name(name: str) -> str:
    """A name of the authors' network in torchvision's words."""
    if name.startswith("initial_"):
        return name.replace("initial_conv", "conv1").replace("initial_batchnorm", "bn1")
    group, block, layer, leaf = name.split(".")
    kind, _, i = layer.rpartition("_")
    part = {
        "conv": lambda: f"conv{int(i) + 1}", "batchnorm": lambda: f"bn{int(i) + 1}",
        "shortcut": lambda: {"conv": "downsample.0", "batchnorm": "downsample.1"}[i],
    }[kind]()  # fmt: skip
    return f"layer{int(group.rpartition('_')[2]) + 1}.{block.rpartition('_')[2]}.{part}.{leaf}"


# --- steps -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, mean; it normalises its images as the authors' step does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=eps)
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv((x - MEAN) / STD))).mean((2, 3))


ONLINE = {"encoder.": "backbone.", "projector.": "projector.", "predictor.": "predictor.", "classifier.": "classifier."}
TARGET = {"encoder.": "target.module.0.", "projector.": "target.module.1."}


@family("byol", "steps_")
def training(case: Case) -> None:
    """All devices as one batch: their BatchNorm and their gradients are those of one."""
    method = BYOL(
        Encoder(case.number("width"), case.number("bn_eps")), online_classes=case.number("num_classes"),
        hidden_dim=case.number("projector_hidden"), dim=case.number("projector_out"),
        predictor_dim=case.number("predictor_hidden"),
    ).double()  # fmt: skip
    method.load_state_dict(
        method.state_dict()
        | renamed(case.tensors("online__"), *ONLINE.items())
        | renamed(case.tensors("target__"), *TARGET.items(), ("predictor.", ""), ("classifier.", ""))
    )
    # the authors average these as well, and never use them
    beside = nn.ModuleDict({"predictor": method.predictor, "classifier": method.classifier})
    averaged = EMATeacher(beside, buffers="keep")
    kept = {n: v for n, v in case.tensors("target__").items() if n.startswith(("predictor.", "classifier."))}
    averaged.module.load_state_dict(averaged.module.state_dict() | kept)
    taus: list[float] = []
    representation: list[Tensor] = []
    assert method.classifier is not None
    add_classifier = method.classifier.add_to

    def watched(found: dict[str, Tensor], h: Tensor, labels: Tensor) -> dict[str, Tensor]:
        representation.append(found["loss"].detach())
        return add_classifier(found, h, labels)

    method.classifier.add_to = watched  # type: ignore[assignment]

    def average(step: int, _: Any) -> None:
        taus.append(method.scheduled["teacher_momentum"])
        averaged.update(beside, taus[-1])

    options = {name: case.number(name) for name in ("momentum", "weight_decay")}
    optimizer = partial(LARS, **options, trust_coefficient=case.number("eta"), variant="torch")
    schedules = {
        "lr": warmed(case.number("warmup_steps")),
        "teacher_momentum": Cosine(case.number("base_target_ema"), 1.0),
    }
    batch_size = case.number("world_size") * case.number("batch_size_per_device")
    recipe = OptimizationRecipe(optimizer, case.number("base_learning_rate"), schedules, "linear")
    clock = one_epoch_steps(1, case.number("max_steps"), batch_size)
    found, rates = run_steps(method, recipe, clock, batches(case), after=average)

    losses = stacked(found, "loss")
    case.compare("loss", losses, 1e-7)
    case.compare("repr_loss", torch.stack(representation), 1e-7)
    case.compare("classif_loss", losses - torch.stack(representation), 1e-7)
    case.compare("top1_accuracy", stacked(found, "online_accuracy"), 1e-7)
    case.compare("tau", taus, 1e-12)
    case.compare("learning_rate", np.array(rates)[:, 0], 1e-12)
    ours = method.state_dict()
    compare_state(case, "online__", renamed(ours, *((v, k) for k, v in ONLINE.items())), 1e-7)
    theirs = renamed(ours, *((v, k) for k, v in TARGET.items()), ("", ""))
    compare_state(case, "target__", averaged.module.state_dict() | theirs, 1e-7)
    case.informative(*(name for name in case.out if name.startswith("haiku__")))


def batches(case: Case) -> Iterator[Batch]:
    views = [case.tensor(name).flatten(1, 2) for name in ("view1", "view2")]
    labels = case.tensor("labels").flatten(1)
    for step, y in enumerate(labels):
        yield Batch([view[step] for view in views], torch.arange(len(y)), y)
