"""How sure a pseudo-label has to be, worked out anew in numpy: SoftMatch's weight and AdaMatch's relative threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfsight.contracts import Batch, SemiBatch
from selfsight.losses.semi import gaussian_weights
from selfsight.methods import AdaMatch, SoftMatch
from selfsight.methods.semi.base import SemiMethod
from selfsight.nn.distributed import all_reduce_sum, world_size

from ..distributed.spawn import run_on

C, B, M, STEPS = 3, 4, 6, 5
Array = NDArray[np.float64]


class AsTheyCome(nn.Module):
    """Its images are the logits."""

    num_features = C

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def make(kind: type[SemiMethod], **settings: Any) -> SemiMethod:
    method = kind(AsTheyCome(), labels=torch.arange(B) % C, num_classes=C, **settings).double().train()
    with torch.no_grad():
        method.heads.weight.copy_(torch.eye(C))
        method.heads.bias.zero_()
    return method


def logits(step: int) -> tuple[Array, Array, Array]:
    """Of labelled images ``[B, C]``, the first half much surer than the second; weak and strong views ``[M, C]``."""
    rng = np.random.default_rng(step)
    labelled = 2 * np.repeat([3.0, 0.3], B // 2)[:, None] * rng.random((B, C))
    return labelled, rng.normal(0, 1.5, (M, C)) + np.array([0.8, 0, -0.5]), rng.normal(0, 1.5, (M, C))


def learn(rank: int, kind: type[SemiMethod], settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What each step reports, meant over processes that share the batch."""
    W, method = world_size(), make(kind, **settings)
    told = []
    for step in range(STEPS):
        x, weak, strong = (torch.from_numpy(part).chunk(W)[rank] for part in logits(step))
        labelled = Batch([x], torch.arange(len(x)), torch.arange(B).chunk(W)[rank] % C)
        found = method.training_step(SemiBatch(labelled, Batch([weak, strong], torch.arange(len(weak)))), step)
        for part in method.states():
            part.commit()
        told.append({name: all_reduce_sum(value.detach().double()) / W for name, value in found.items()})
    return told


def softmax(x: Array) -> Array:
    e = np.exp(x)
    return e / e.sum(1, keepdims=True)


def cross_entropies(x: Array, classes: Array) -> Array:
    return -np.log(softmax(x)[np.arange(len(x)), classes])


def follow(old: Array | float, new: Array | float, m: float) -> Any:
    return m * np.asarray(old) + (1 - m) * np.asarray(new)


def softmatch(n_sigma: float, m: float, align: bool, lambda_u: float) -> list[dict[str, float]]:
    mu, var, model = 1 / C, 1.0, None
    told = []
    for step in range(STEPS):
        x, weak, strong = logits(step)
        p = softmax(weak)
        aligned = p
        if align:  # to the uniform distribution, from a running mean that begins at the first batch's
            model = p.mean(0) if model is None else follow(model, p.mean(0), m)
            aligned = p * (1 / C + 1e-6) / (model + 1e-6)
            aligned /= aligned.sum(1, keepdims=True)
        c = aligned.max(1)
        mu, var = follow(mu, c.mean(), m), follow(var, ((c - c.mean()) ** 2).sum() / (M - 1), m)
        weight = np.array([1.0 if one >= mu else np.exp(-(((one - mu) * n_sigma) ** 2) / (2 * var)) for one in c])
        unsup = (weight * cross_entropies(strong, p.argmax(1))).mean()
        sup = cross_entropies(x, np.arange(B) % C).mean()
        means = {"confidence": mu, "mask_rate": weight.mean()}
        told.append({"loss": sup + lambda_u * unsup, "loss_sup": sup, "loss_unsup": unsup, **means})
    return told


def adamatch(tau: float, m: float, lambda_u: float) -> list[dict[str, float]]:
    model, target = None, np.full(C, 1 / C)
    told = []
    for step in range(STEPS):
        x, weak, strong = logits(step)
        p_x, p = softmax(x), softmax(weak)
        model = p.mean(0) if model is None else follow(model, p.mean(0), m)
        target = follow(target, p_x.mean(0), m)
        p = p * (target + 1e-6) / (model + 1e-6)
        p /= p.sum(1, keepdims=True)
        threshold = tau * p_x.max(1).mean()  # of labelled images as the network sees them, which nothing aligns
        mask = p.max(1) >= threshold
        unsup = (mask * cross_entropies(strong, p.argmax(1))).mean()
        sup = cross_entropies(x, np.arange(B) % C).mean()
        means = {"threshold": threshold, "mask_rate": mask.mean()}
        told.append({"loss": sup + lambda_u * unsup, "loss_sup": sup, "loss_unsup": unsup, **means})
    return told


SETTINGS: dict[str, tuple[type[SemiMethod], dict[str, Any]]] = {
    "SoftMatch": (SoftMatch, {"n_sigma": 2.0, "m": 0.3, "align": True, "lambda_u": 0.5}),
    "SoftMatch, a wider Gaussian": (SoftMatch, {"n_sigma": 0.5, "m": 0.3, "align": True, "lambda_u": 0.5}),
    "SoftMatch, not aligned": (SoftMatch, {"n_sigma": 2.0, "m": 0.2, "align": False, "lambda_u": 1.0}),
    "AdaMatch": (AdaMatch, {"tau": 0.95, "m": 0.7, "lambda_u": 0.5}),
    "AdaMatch, a lower share": (AdaMatch, {"tau": 0.7, "m": 0.2, "lambda_u": 1.0}),
}


def expected(name: str) -> list[dict[str, float]]:
    kind, settings = SETTINGS[name]
    return softmatch(**settings) if kind is SoftMatch else adamatch(**settings)


def check(found: list[dict[str, Tensor]], wanted: list[dict[str, float]]) -> None:
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert {name: float(one[name]) for name in other} == pytest.approx(other, rel=1e-6), f"step {step}"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_by_hand(name: str) -> None:
    check(learn(0, *SETTINGS[name]), expected(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_equal_one(name: str) -> None:
    """Of whose labelled images one has the sure ones: a threshold of its own would be another."""
    for process in run_on(2, learn, *SETTINGS[name]):
        check(process, expected(name))


def test_the_cases_are_ones_in_which_it_matters() -> None:
    """Some of a batch count in full and some do not, and a process would ask another share by its own labels."""
    for name in SETTINGS:
        assert any(step["mask_rate"] < 0.99 for step in expected(name)), name
    halves = np.stack([softmax(logits(step)[0]).max(1).reshape(2, -1).mean(1) for step in range(STEPS)])
    assert (halves[:, 0] - halves[:, 1]).max() > 0.2


def test_a_weight_is_one_above_the_mean_and_a_gaussian_below() -> None:
    """Of a standard deviation of 0.2: at one of the Gaussian's own below the mean it is exp(-1/2)."""
    mean, variance = torch.tensor(0.7), torch.tensor(0.04)
    for n_sigma in (1.0, 2.0):
        confidence = torch.tensor([1.0, 0.7, 0.7 - 0.2 / n_sigma, 0.7 - 0.4 / n_sigma])
        found = gaussian_weights(confidence, mean, variance, n_sigma)
        torch.testing.assert_close(found, torch.tensor([0, 0, -0.5, -2]).exp())


@pytest.mark.parametrize("m", [0.0, 0.5])
def test_one_image_moves_the_variance_and_leaves_numbers(m: float) -> None:
    method = make(SoftMatch, m=m)
    found: Mapping[str, Tensor] = method.training_step(
        SemiBatch(
            Batch([torch.zeros(1, C).double()], torch.zeros(1).long(), torch.zeros(1).long()),
            Batch([torch.randn(1, C).double(), torch.randn(1, C).double()], torch.zeros(1).long()),
        ),
        0,
    )
    assert bool(found["loss"].isfinite())
    method.commit()
    assert float(method.var) == m, "there is no spread to one number"
