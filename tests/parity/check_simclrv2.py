"""The numbers of SimCLRv2's authors' code: loss, distillation, network, head, and whole training steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.backbones.simclr_resnet import BasicBlock, Bottleneck, SelectiveKernel
from selfsight.checkpoints.simclr import Pretrained, state_dicts, variable_names
from selfsight.contracts import Batch
from selfsight.losses.distillation import distillation, distillation_with_labels
from selfsight.losses.ntxent import contrast_accuracy, contrast_entropy, cross_view_logits, ntxent
from selfsight.methods.base import Method
from selfsight.methods.finetune import FineTune
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.nn.batchnorm import BiasedBatchNorm1d, BiasedBatchNorm2d
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.optim import LARS, l2_penalty, outside_batchnorm

from ..distributed.ntxent import loss_on
from ..distributed.spawn import run_on
from .harness import Case, family

NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def options(case: Case) -> dict[str, Any]:
    return {"temperature": case.number("temperature"), "normalize": bool(case.number("hidden_norm"))}


@family("simclrv2", "ntxent_")
def loss(case: Case) -> None:
    z = case.tensor("z", requires_grad=True)
    z1, z2 = z.chunk(2)
    for chunk_size in (None, 3):
        z.grad = None
        got = ntxent(z1, z2, **options(case), chunk_size=chunk_size)
        got.backward()
        case.compare("loss", got, 1e-9)
        case.compare("grad", z.grad, 1e-9)
    logits, labels = cross_view_logits(z1, z2, **options(case))
    case.compare("logits_ab", logits, 1e-9)
    case.compare("labels", labels, 0)
    case.compare("contrast_acc", contrast_accuracy(logits, labels), 1e-5)
    case.compare("contrast_entropy", contrast_entropy(logits), 1e-5)


@family("simclrv2", "ntxent_replicas_", slow=True)
def loss_of_replicas(case: Case) -> None:
    z = case.tensor("z")
    ranks = run_on(len(z), loss_on, z, options(case))
    losses = torch.stack([rank["loss"] for rank in ranks])
    case.compare("loss_per_replica", losses, 1e-9)
    case.compare("loss_mean", losses.mean(), 1e-9)
    case.compare("logits_ab", torch.stack([rank["logits"] for rank in ranks]), 1e-9)
    case.compare("grad_of_mean", torch.stack([rank["grad"] for rank in ranks]) / len(z), 1e-9)


@family("simclrv2", "distill_")
def distilled(case: Case) -> None:
    teacher, temperature = case.tensor("teacher_logits"), case.number("temperature")
    for suffix, tau2 in (("", True), ("_paper", False)):
        student = case.tensor("student_logits", requires_grad=True)
        got = distillation(student, teacher, temperature=temperature, tau2=tau2)
        got.backward()
        case.compare(f"loss{suffix}", got, 1e-9)
        case.compare(f"grad_student{suffix}", student.grad, 1e-9)


@family("simclrv2", "distill_combined")
def distilled_with_labels(case: Case) -> None:
    student, teacher = case.tensor("student_logits", requires_grad=True), case.tensor("teacher_logits")
    labels = torch.full((len(student),), -1)
    labels[case.tensor("labelled_rows")] = case.tensor("labels")
    temperature = case.number("temperature")
    parts = {"loss_supervised": 0.0, "loss_distill": 1.0, "loss": case.number("alpha")}
    for name, alpha in parts.items():
        got = distillation_with_labels(student, teacher, labels, temperature=temperature, alpha=alpha)
        case.compare(name, got, 1e-9)
    got.backward()
    case.compare("grad_student", student.grad, 1e-9)


def load_norm(norm: nn.Module, case: Case, prefix: str) -> None:
    arrays = case.tensors(prefix)
    norm.load_state_dict({ours: arrays[theirs] for theirs, ours in NORM.items() if theirs in arrays}, strict=False)


@family("simclrv2", "bn_")
def batch_norm(case: Case) -> None:
    x = case.tensor("x")
    biased, plain = (BiasedBatchNorm1d, nn.BatchNorm1d) if x.ndim == 2 else (BiasedBatchNorm2d, nn.BatchNorm2d)
    kind = plain if case.number("unbiased_running_var") else biased
    norm = kind(x.shape[1], eps=case.number("eps"), momentum=1 - case.number("momentum_decay")).double()
    load_norm(norm, case, "")
    tolerance = 1e-5 if case.out["y_eval"].dtype == np.float32 else 1e-8
    case.compare("y_eval", norm.eval()(x), tolerance)
    case.compare("y_train", norm.train()(x), tolerance)
    case.compare("after_moving_mean", norm.running_mean, 1e-6)
    case.compare("after_moving_variance", norm.running_var, 1e-6)


def projection_head(case: Case) -> ProjectionHead:
    weights = [case.tensor(f"nl_{j}_weight") for j in range(sum(n.endswith("_weight") for n in case.tensors("nl_")))]
    head = ProjectionHead(weights[0].shape[1], weights[-1].shape[0], len(weights)).double()
    for j, weight in enumerate(weights):
        head[j].linear.weight.data = weight
        load_norm(head[j].bn, case, f"nl_{j}_bn_")
    return head


@family("simclrv2", "projection_head_")
def head_outputs(case: Case) -> None:
    head, x = projection_head(case), case.tensor("x")
    assert len(head) == case.number("num_layers")
    for mode in ("eval", "train"):
        for k, output in enumerate(head.train(mode == "train").outputs(x)):
            case.compare(f"{mode}_h{k}", output, 1e-8)
    for j, layer in enumerate(head):
        case.compare(f"after_nl_{j}_bn_moving_mean", layer.bn.running_mean, 1e-6)
        case.compare(f"after_nl_{j}_bn_moving_variance", layer.bn.running_var, 1e-6)


class Features(nn.Identity):
    """Stands in for a backbone whose features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@family("simclrv2", "finetune_from_layer")
def finetune_from_layer(case: Case) -> None:
    x, labels, decay = case.tensor("x", requires_grad=True), case.tensor("labels"), case.number("weight_decay")
    kernel, layer = case.tensor("head_weight"), case.number("selector")
    method = FineTune(
        Features(x.shape[1]),
        projector=projection_head(case),
        layer=layer,
        num_classes=len(kernel),
        freeze_projector=False,
        freeze_after=-1,
        frozen_statistics=False,
        classifier_decay=decay,
    ).double()
    method.classifier.load_state_dict({"weight": kernel, "bias": case.tensor("head_bias")})
    case.compare("selected", method.selected(x), 1e-6)
    case.compare("logits", method(x), 1e-6)
    got = method.training_step(Batch([x], torch.arange(len(x)), labels), 0)["loss"]
    penalty = l2_penalty([method.classifier.weight], decay)
    case.compare("reg", penalty, 1e-6)
    case.compare("loss", got - penalty, 1e-6)
    got.backward()
    case.compare("grad_x", x.grad, 1e-6)
    case.compare("grad_head", method.classifier.weight.grad, 1e-6)
    if "grad_nl0" in case.out:
        case.compare("grad_nl0", method.projector[0].linear.weight.grad, 1e-6)


def load_by_role(
    module: nn.Module, case: Case, convolutions: dict[str, nn.Module], norms: dict[str, nn.Module]
) -> None:
    module.double()
    for role, convolution in convolutions.items():
        convolution.weight.data = case.tensor(f"{role}_weight")
    for role, norm in norms.items():
        load_norm(norm, case, f"{role}_")


def selective_roles(unit: SelectiveKernel, prefix: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    convolutions = {f"{prefix}conv": unit.conv, f"{prefix}fc1": unit.fc1, f"{prefix}fc2": unit.fc2}
    return convolutions, {f"{prefix}bn0": unit.bn, f"{prefix}bn1": unit.fc1_bn}


@family("simclrv2", "sk_unit_")
def selective_kernel(case: Case) -> None:
    x, filters = case.tensor("x"), case.number("filters")
    ratio, min_dim = case.number("sk_ratio"), case.number("min_dim")
    unit = SelectiveKernel(x.shape[1], filters, case.number("stride"), ratio, min_dim)
    assert unit.fc1.out_channels == case.number("mid_dim")
    load_by_role(unit, case, *selective_roles(unit, ""))
    case.compare("y_eval", unit.eval()(x), 1e-8)
    case.compare("y_train", unit.train()(x), 1e-8)


@family("simclrv2", "block_")
def block(case: Case) -> None:
    x, bottleneck = case.tensor("x"), "conv3_weight" in case.inp
    unit = (Bottleneck if bottleneck else BasicBlock)(
        x.shape[1],
        case.number("filters"),
        stride=case.number("stride"),
        project=bool(case.number("use_projection")),
        sk_ratio=case.number("sk_ratio"),
    )
    convolutions: dict[str, nn.Module] = {"conv1": unit.conv1}
    norms: dict[str, nn.Module] = {"bn1": unit.bn1}
    if isinstance(unit.conv2, SelectiveKernel):
        for known, more in zip((convolutions, norms), selective_roles(unit.conv2, "sk_"), strict=True):
            known.update(more)
    else:
        convolutions["conv2"], norms["bn2"] = unit.conv2, unit.bn2
    if bottleneck:
        convolutions["conv3"], norms["bn3"] = unit.conv3, unit.bn3
    if unit.downsample is not None:
        convolutions["shortcut"], norms["shortcut_bn"] = unit.downsample[-2], unit.downsample[-1]
    load_by_role(unit, case, convolutions, norms)
    case.compare("y_eval", unit.eval()(x), 1e-8)
    case.compare("y_train", unit.train()(x), 1e-8)


def waves(n: int, step: float, offset: float) -> np.ndarray:
    """``frac(i step + offset)`` for i = 1 .. n."""
    return np.modf(np.arange(1, n + 1) * step + offset)[0]


def images(batch: int, height: int, width: int, offset: float) -> Tensor:
    x = waves(batch * height * width * 3, 0.7548776662466927, offset).reshape(batch, height, width, 3)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def closed_form(target: Pretrained, offset: float) -> dict[str, np.ndarray]:
    """Every TensorFlow variable of ``target`` by the recorded formula, numbered in order of creation."""
    variables = {}
    for k, (name, (part, key)) in enumerate(variable_names(target).items()):
        shape = tuple(getattr(target, part).state_dict()[key].shape)
        if name.endswith("kernel"):
            shape = (*shape[2:], shape[1], shape[0])
        u = waves(int(np.prod(shape)), 0.6180339887498949, 0.31 * k + offset)
        s = (2 * u - 1) * np.sqrt(3)
        kind = name.rsplit("/", 1)[1]
        value = {
            "kernel": s * np.sqrt(2 / np.prod(shape[:-1])),
            "gamma": 1 + 0.1 * s,
            "beta": 0.1 * s,
            "moving_mean": 0.05 * s,
            "moving_variance": 1 + 0.2 * s,
            "bias": 0.1 * s,
        }[kind]
        variables[name] = value.reshape(shape)
    return variables


def set_closed_form(target: Pretrained, offset: float) -> dict[str, np.ndarray]:
    variables = closed_form(target, offset)
    for part, state in state_dicts(variables, target).items():
        getattr(target, part).double().load_state_dict(state, strict=False)
    return variables


@family("simclrv2", "net_", slow=True)
def network(case: Case) -> None:
    spec = {
        "name": f"simclr_resnet{case.number('depth')}",
        "width": case.number("width"),
        "sk_ratio": case.number("sk_ratio"),
        "stem": "cifar" if case.number("cifar_stem") else "imagenet",
    }
    net, offset = create(**spec), case.number("offset")
    variables = set_closed_form(Pretrained(spec, net, None, None), offset)
    assert len(variables) == case.number("num_variables")
    first = [value.flat[0] for value in list(variables.values())[: len(case.inp["first_weights_check"])]]
    np.testing.assert_allclose(first, case.inp["first_weights_check"], rtol=0, atol=1e-12)
    x = images(case.number("batch"), case.number("height"), case.number("width_px"), offset)
    start = x.permute(0, 2, 3, 1).flatten()[: len(case.inp["first_input_check"])]
    np.testing.assert_allclose(start, case.inp["first_input_check"], rtol=0, atol=1e-12)

    places = {"initial_conv": "conv1", "initial_max_pool": "maxpool"}
    places |= {f"block_group{i}": f"layer{i}" for i in range(1, 5)}
    for mode in sorted({name.split("_")[0] for name in case.out}):
        net.train(mode == "train")
        features, seen = watched(net, list(places.values()), x)
        case.compare(f"{mode}_features", features, 1e-8)
        for name, module in places.items():
            y = seen[module]
            case.compare(f"{mode}_{name}_channel_mean", y.mean((2, 3)), 1e-8)
            case.compare(f"{mode}_{name}_map", y.mean(1), 1e-8)


@torch.no_grad()
def watched(net: nn.Module, modules: list[str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output for ``x``, and that of every one of ``modules``."""
    seen: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda _m, _i, y, name=name: seen.update({name: y.clone()}))
        for name in modules
    ]
    y = net(x)
    for hook in hooks:
        hook.remove()
    return y, seen


@family("simclrv2", "train_", slow=True)
def training(case: Case) -> None:
    hp = {name: case.number(name) for name in case.hp}
    spec = {"name": f"simclr_resnet{hp['depth']}", "stem": "cifar"}
    backbone = create(**spec)
    width: int = backbone.num_features  # type: ignore[assignment]
    projector = ProjectionHead(width, hp["proj_out_dim"], hp["num_proj_layers"])
    set_closed_form(Pretrained(spec, backbone, projector, None), hp["offset"])
    method: Method
    if hp["finetune"]:
        method = FineTune(
            backbone,
            projector=projector,
            layer=hp["selector"],
            num_classes=hp["num_classes"],
            freeze_projector=not hp["train_head"],
            freeze_after=hp["fine_tune_after_block"],
            frozen_statistics=False,
            classifier_decay=hp["weight_decay"] if hp["optimizer_is_lars"] else 0.0,
        ).double()
        made = Pretrained(spec, backbone, projector, method.classifier)
        outputs_of: nn.Module = method.classifier
    else:
        method = pretraining(backbone, projector, hp["temperature"])
        made = Pretrained(spec, backbone, projector, None)
        outputs_of = projector[-1]
    method.train()
    outputs: list[Tensor] = []
    outputs_of.register_forward_hook(lambda _m, _i, y: outputs.append(y.detach()))

    optimizer: torch.optim.Optimizer
    if hp["optimizer_is_lars"]:
        optimizer = LARS(method.param_groups(), lr=0.0, momentum=0.9, weight_decay=hp["weight_decay"])
    else:
        decayed = outside_batchnorm(method)
        plain = [p for p in method.parameters() if p.requires_grad and all(p is not q for q in decayed)]
        groups = [{"params": decayed, "weight_decay": hp["weight_decay"]}, {"params": plain}]
        optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=0.9, nesterov=True)

    losses, norms, first = [], [], []
    for t, lr in enumerate(hp["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = [
            images(hp["batch"], hp["size"], hp["size"], hp["offset"] + 0.017 * t + 0.4 * v)
            for v in range(1 if hp["finetune"] else 2)
        ]
        labels = case.tensor("labels")[t] if hp["finetune"] else None
        method.begin_step(t)
        step = method.training_step(Batch(views, torch.arange(hp["batch"]), labels), t)["loss"]
        optimizer.zero_grad()
        step.backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        values = [getattr(made, part).state_dict()[key].detach() for part, key in variable_names(made).values()]
        losses.append(step.detach())
        norms.append(torch.stack([v.norm() for v in values]))
        first.append(torch.stack([v.flatten()[torch.arange(4) % v.numel()] for v in values]))
    case.compare("loss", torch.stack(losses), 1e-6)
    case.compare("outputs", torch.stack(outputs), 1e-6)
    case.compare("variable_norms", torch.stack(norms), 1e-6)
    case.compare("variable_first4", torch.stack(first), 1e-6)


def pretraining(backbone: nn.Module, projector: ProjectionHead, temperature: float) -> SimCLRv2:
    method = SimCLRv2(
        backbone,
        temperature=temperature,
        projection_dim=projector.widths[-1],
        projection_layers=len(projector),
        reduction="sum_of_means",
        chunk_size=None,
        memory=0,
        memory_momentum=0.0,
        online_classes=0,
        classifier_decay=0.0,
    )
    method.projector = projector
    return method.double()
