"""The tiny networks that the recorded steps of several methods share, and the plain loop around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from selfsight.contracts import Batch
from selfsight.methods.base import Method
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Schedule

from ..distributed.spawn import run_on
from .check_optim import Named, steps, trajectory
from .harness import Case


class TinyNet(nn.Module):
    """3x3 - BatchNorm - ReLU - 3x3 of stride 2 - BatchNorm - ReLU - mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.num_features = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x))).mean((2, 3))


class TinyResNet(nn.Module):
    """One basic block of torchvision a stage, strides 1, 2, 2, 2, ``widths`` wide; its stem as wide as the first."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise([widths[0], *widths])):
            stride, shortcut = 2 if i else 1, None
            if stride > 1 or fan_in != fan_out:
                shortcut = nn.Sequential(conv1x1(fan_in, fan_out, stride), nn.BatchNorm2d(fan_out))
            self.add_module(f"layer{i + 1}", nn.Sequential(BasicBlock(fan_in, fan_out, stride, shortcut)))
        self.num_features, self.stages = widths[-1], len(widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean((2, 3))


class NoBackbone(nn.Module):
    """Hands on what it gets, where cases begin at features."""

    def __init__(self, num_features: int = 1) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def tiny_vit(
    img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int,
    kind: type[VisionTransformer] = VisionTransformer, eps: float = 1e-6, **options: Any,
) -> VisionTransformer:  # fmt: skip
    """A transformer of timm of the sizes of a case, without classifier unless asked."""
    return kind(
        img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        norm_layer=partial(nn.LayerNorm, eps=eps), **{"num_classes": 0, **options},
    )  # fmt: skip


def renamed(tensors: Mapping[str, Any], *prefixes: tuple[str, str]) -> dict[str, Any]:
    """Every name with the first of ``prefixes`` it begins with replaced; an empty new one drops the tensor."""
    found = {}
    for name, value in tensors.items():
        for old, new in prefixes:
            if name.startswith(old):
                name = new and new + name.removeprefix(old)
                break
        if name:
            found[name] = value
    return found


def compare_state(case: Case, prefix: str, state: Mapping[str, Any], tolerance: float) -> None:
    """Every output ``<prefix><name>`` with the tensor of that name."""
    for name in case.out:
        if name.startswith(prefix):
            case.compare(name, state[name.removeprefix(prefix)], tolerance)


def module_case(case: Case, module: nn.Module, *, y: str, tolerance: float, x: str = "x") -> None:
    """A module from ``sd__*`` on ``x``, the gradients of the sum of its output times ``upstream``, and eval mode."""
    module.double().load_state_dict(module.state_dict() | case.tensors("sd__"))
    inputs = case.tensor(x, requires_grad=True)
    output = module(inputs)
    (output * case.tensor("upstream")).sum().backward()
    case.compare(y, output, tolerance)
    case.compare(f"grad_{x}", inputs.grad, tolerance)
    compare_state(case, "grad__", {name: p.grad for name, p in module.named_parameters()}, tolerance)
    compare_state(case, "sd__", module.state_dict(), tolerance)
    if f"{y}_eval" in case.out:
        case.compare(f"{y}_eval", module.eval()(inputs), tolerance)


def one_epoch_steps(steps_per_epoch: int, epochs: float, batch_size: int = 256, total: int | None = None) -> Clock:
    return Clock(examples=1, batch_size=batch_size, epochs=epochs, steps_per_epoch=steps_per_epoch, total=total)


def rates_of(schedule: Schedule, clock: Clock, lr: float, count: int | None = None) -> np.ndarray:
    """The learning rate of every step, scaled linearly with the batch."""
    recipe = OptimizationRecipe(torch.optim.SGD, lr, {"lr": schedule}, scaling="linear")
    return np.array([recipe.values(step, clock)["lr"] for step in range(count or clock.total_steps)])


def run_steps(
    method: Method,
    recipe: OptimizationRecipe,
    clock: Clock,
    batches: Iterable[Batch],
    *,
    first: int = 0,
    after: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> tuple[list[dict[str, Tensor]], list[list[float]]]:
    """The plain loop over ``batches`` from step ``first`` on: what each step returned, and the rates of the groups."""
    optimizer = method.configure(recipe, clock).configure_optimizers()
    found, rates = [], []
    for step, batch in enumerate(batches, first):
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(batch, step)
        result["loss"].backward()
        if world_size() > 1:  # as data parallel training does
            for p in method.parameters():
                if p.grad is not None:
                    p.grad = all_reduce_sum(p.grad) / world_size()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        found.append({name: value.detach() for name, value in result.items()})
        rates.append([group["lr"] for group in optimizer.param_groups])
        if after is not None:
            after(step, found[-1])
    return found, rates


def stacked(found: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.stack([result[name] for result in found])


def two_views(case: Case, step: int, *names: str) -> Batch:
    """The batch of a step; the same ones come in every epoch."""
    views = [case.tensor(name) for name in names or ("view1", "view2")]
    views = [view[step % len(view)] for view in views]
    return Batch(views, torch.arange(len(views[0])))


Found = dict[str, Tensor]


def gradients(tensors: Mapping[str, Tensor]) -> Found:
    """``grad_<name>`` of each, all of which have one."""
    found = {}
    for name, tensor in tensors.items():
        assert tensor.grad is not None, f"no gradient reaches {name}"
        found[f"grad_{name}"] = tensor.grad
    return found


def of_processes(case: Case, function: Callable[[int, Case], Found]) -> list[Found]:
    """``[function(rank, case) for each rank]`` on as many processes as the case has."""
    return run_on(case.number("world_size"), function, case)


def lars_trajectory(case: Case, groups: Callable[[nn.Module], list[dict[str, Any]]], **options: Any) -> None:
    """Recorded gradients through LARS: parameters after every step, the last momenta."""
    model = Named(undotted(case.tensors("param_")))
    optimizer = LARS(
        groups(model), lr=0.0, momentum=case.number("momentum"), weight_decay=case.number("weight_decay"),
        variant="torch", **options,
    )  # fmt: skip
    gradients = [{**g, "nograd": None} for g in steps(undotted(case.tensors("grad_")))]
    rates = case.inp["lr"]
    parameters: list[dict[str, np.ndarray]] = []
    if rates.ndim == 1:
        parameters = list(trajectory(model, optimizer, gradients, rates.tolist()))
    else:  # a rate for kernels and one for the rest
        for gradient, (kernels, rest) in zip(gradients, rates.tolist(), strict=True):
            model.set_gradients(gradient)
            for group in optimizer.param_groups:
                group["lr"] = rest if all(p.ndim == 1 for p in group["params"]) else kernels
            optimizer.step()
            parameters.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        theirs = name.replace("/", ".")
        case.compare(f"param_{theirs}", np.stack([after[name] for after in parameters]), 1e-9)
        if f"momentum_{theirs}" in case.out:
            case.compare(f"momentum_{theirs}", optimizer.state[p]["momentum_buffer"], 1e-9)


def undotted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that a parameter may have."""
    return {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
