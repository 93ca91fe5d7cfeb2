"""A small semi-supervised world for tests: networks of a few weights, images that are noisy class pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch, SemiBatch
from selfsight.methods.semi.adamatch import AdaMatch
from selfsight.methods.semi.base import SemiMethod
from selfsight.methods.semi.comatch import CoMatch
from selfsight.methods.semi.fixmatch import FixMatch
from selfsight.methods.semi.flexmatch import FlexMatch
from selfsight.methods.semi.freematch import FreeMatch
from selfsight.methods.semi.meanteacher import MeanTeacher
from selfsight.methods.semi.mixmatch import MixMatch
from selfsight.methods.semi.remixmatch import ReMixMatch
from selfsight.methods.semi.simmatch import SimMatch
from selfsight.methods.semi.simmatchv2 import SimMatchV2
from selfsight.methods.semi.softmatch import SoftMatch
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Constant

CLASSES, LABELLED, UNLABELLED = 4, 8, 64
SPREAD, WEAK, STRONG = 1.5, 0.3, 1.0
LABELS = torch.arange(LABELLED) % CLASSES


class Net(nn.Module):
    """Convolution, normalisation of one's choice, ReLU, mean: eight features."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, bias=False)
        self.norm = norm(8)
        self.num_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


def no_norm(width: int) -> nn.Module:
    return nn.Identity()


SETTINGS: dict[str, tuple[type[SemiMethod], dict[str, Any]]] = {
    "simmatchv2": (
        SimMatchV2,
        {"dim": 6, "K": 40, "t": 0.1, "alpha": 0.1, "topn": 5, "tau": 0.8, "lambda_nn": 1.0, "lambda_ee": 1.0,
         "lambda_ne": 1.0, "da_m": 0.9, "norm_feat": False, "eman": False, "decay": "kernels"},
    ),
    "fixmatch": (FixMatch, {"tau": 0.6, "lambda_u": 1.0, "da_m": 0.9}),
    "flexmatch": (
        FlexMatch,
        {"tau": 0.95, "lambda_u": 1.0, "da_m": None, "warmup": True, "num_unlabelled": UNLABELLED},
    ),
    "freematch": (FreeMatch, {"lambda_u": 1.0, "w_f": 0.01, "m": 0.9, "quantile": False, "clip": None}),
    "softmatch": (SoftMatch, {"lambda_u": 0.3, "n_sigma": 2.0, "m": 0.9, "align": True}),
    "adamatch": (AdaMatch, {"tau": 0.9, "lambda_u": 1.0, "m": 0.9}),
    "mixmatch": (MixMatch, {"T": 0.5, "mixup_alpha": 0.5, "lambda_u": 5.0, "ramp": 0.4}),
    "remixmatch": (
        ReMixMatch,
        {"T": 0.5, "mixup_alpha": 0.75, "lambda_u": 1.5, "lambda_s": 0.5, "lambda_r": 0.5, "ramp": 0.1,
         "align": "window", "window": 4},
    ),
    "meanteacher": (MeanTeacher, {"weight": 20.0, "ramp": 0.4}),
    "comatch": (
        CoMatch,
        {"dim": 6, "K": 40, "T": 0.2, "alpha": 0.9, "tau": 0.6, "tau_c": 0.5, "lambda_u": 1.0, "lambda_c": 1.0,
         "da_length": 4, "queue_batches": 2},
    ),
    "simmatch": (
        SimMatch,
        {"dim": 6, "tt": 0.1, "st": 0.1, "alpha": 0.9, "tau": 0.6, "lambda_u": 1.0, "lambda_in": 1.0, "da_length": 4,
         "da_eps": 1e-6, "teacher": True, "bank_m": 0.7, "decay": "kernels"},
    ),
}  # fmt: skip


def make(name: str, backbone: Callable[[], nn.Module] = Net, seed: int = 0, **changes: Any) -> SemiMethod:
    """A method in training mode with SGD, by the name of its file."""
    kind, settings = SETTINGS[name]
    torch.manual_seed(seed)
    sizes = {"labels": LABELS, "num_classes": CLASSES}
    method = kind(backbone(), **{**sizes, **settings, **changes})
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=1e-4)
    recipe = OptimizationRecipe(sgd, 0.1, {"teacher_momentum": Constant(0.9)})
    method.configure(recipe, Clock(examples=16, batch_size=4, epochs=50, steps_per_epoch=4))
    return method.train()


def pictures(labels: Tensor, seed: int) -> Tensor:
    """``[B, 3, 5, 5]`` pictures: a pattern for each class, and as much that is each picture's own."""
    patterns = torch.randn(CLASSES, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    return patterns[labels] + SPREAD * torch.randn(len(labels), 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def view(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return images + noise * torch.randn(images.shape, generator=generator)


def batch(step: int, name: str, labelled: int = 4, unlabelled: int = 8, known: bool = True) -> SemiBatch:
    """The batch of a step: drawn from the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    index = torch.randint(LABELLED, (labelled,), generator=generator)
    index_u = torch.randperm(UNLABELLED, generator=generator)[:unlabelled]
    y_u = torch.arange(UNLABELLED) % CLASSES
    few, many = pictures(LABELS, seed=1)[index], pictures(y_u, seed=2)[index_u]
    two_weak, two_strong = (WEAK, WEAK), (WEAK, STRONG, STRONG)
    noises = {"mixmatch": two_weak, "meanteacher": two_weak, "comatch": two_strong, "remixmatch": two_strong}.get(
        name, (WEAK, STRONG)
    )
    views = [view(many, noise, generator) for noise in noises]
    x = view(few, WEAK, generator)
    return SemiBatch(Batch([x], index, LABELS[index]), Batch(views, index_u, y_u[index_u] if known else None))


def train(
    method: SemiMethod, name: str, steps: range, optimizer: torch.optim.Optimizer | None = None, **sizes: Any
) -> tuple[list[dict[str, Tensor]], torch.optim.Optimizer]:
    """The plain loop; what every step reported, and the optimiser."""
    optimizer = optimizer or method.configure_optimizers()
    seen = []
    for step in steps:
        torch.manual_seed(step)  # MixMatch draws its mixtures, ReMixMatch turns as well
        method.begin_step(step)
        result = method.training_step(batch(step, name, **sizes), step)
        optimizer.zero_grad()
        result["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        seen.append({key: value.detach() for key, value in result.items()})
    return seen, optimizer


def accuracy(method: SemiMethod, teacher: bool) -> float:
    """On 400 fresh pictures."""
    labels = torch.arange(400) % CLASSES
    images = pictures(labels, seed=5)
    method.eval()
    with torch.no_grad():
        right = method.logits(images, teacher=teacher).argmax(-1) == labels
    method.train()
    return float(right.float().mean())
