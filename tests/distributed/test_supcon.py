"""Two processes with half of a batch each compute and train SupCon and SupCE like one with the whole of it."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.supcon import CONTRAST_MODES, DENOMINATORS, SUMMATIONS, supcon_per_anchor
from selfsight.methods.base import Method
from selfsight.methods.supce import SupCE
from selfsight.methods.supcon import SupCon
from selfsight.nn.distributed import all_reduce_sum, world_size

from ..small import SmallNet, batches, prepare
from .spawn import run_on

N, V, STEPS = 6, 3, 4
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)
FAMILY = list(itertools.product(CONTRAST_MODES, SUMMATIONS, DENOMINATORS, ("labels", "mask", "views"), (None, V)))


def losses(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Per anchor, and the gradient at this process's features of the mean over processes, for the whole family."""
    W, g, found = world_size(), torch.Generator().manual_seed(0), []
    f = F.normalize(torch.randn(N, V, 5, generator=g, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    mask = torch.randint(0, 3, (N, N), generator=g).double()
    local = slice(rank * N // W, (rank + 1) * N // W)
    for mode, summation, denominator, pairs, cap in FAMILY:
        mine = f[local].clone().requires_grad_()
        which = {"labels": labels[local]} if pairs == "labels" else {"mask": mask[local]} if pairs == "mask" else {}
        per_anchor = supcon_per_anchor(
            mine, **which, temperature=0.1, base_temperature=0.07, contrast_mode=mode, summation=summation,
            denominator=denominator, positives_cap=cap,
        )  # fmt: skip
        (per_anchor.mean() / W).backward()
        assert mine.grad is not None
        found.append((per_anchor.detach(), mine.grad))
    return found


def make(kind: str) -> Method:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    backbone = SmallNet(norm=nn.Identity)
    method: Method
    if kind == "supce":
        method = SupCE(backbone, num_classes=3, label_smoothing=0.1, decay="all")
    else:
        method = SupCon(
            backbone, supervised=kind == "supcon", hidden_dim=None, dim=5, last_bias=True, init_std=None,
            normalize_embedding=False, temperature=0.1, base_temperature=0.07, contrast_mode="all", summation="out",
            denominator="all", positives_cap=None, decay="all",
        )  # fmt: skip
    return prepare(method.double(), SGD, 0.1, 2, 2)


def train(rank: int, kind: str) -> dict[str, Any]:
    method, W = make(kind), world_size()
    optimizer = method.configure_optimizers()
    steps, data = [], batches([16, 16, 8], N, 2, dtype=torch.float64)
    for step in range(STEPS):
        batch = data[step % 2]
        indices = batch.indices.chunk(W)[rank]
        labels = torch.where(indices == 4, -1, indices % 3) if kind == "supcon" else indices % 3
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(Batch([v.chunk(W)[rank] for v in batch.views], indices, labels), 0)
        result["loss"].backward()
        for p in method.parameters():  # as data parallel training does
            assert p.grad is not None
            p.grad = all_reduce_sum(p.grad) / W
        optimizer.step()
        method.end_step()
        steps.append({name: all_reduce_sum(value) / W for name, value in result.items()})
    return {"steps": steps, "state": method.state_dict()}


KINDS = ("supcon", "unsupervised", "supce")


def everything(rank: int) -> dict[str, Any]:
    return {"losses": losses(rank), **{kind: train(rank, kind) for kind in KINDS}}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return run_on(2, everything)


def test_loss_and_gradient(on_two: list[dict[str, Any]]) -> None:
    whole = losses(0)
    for i, options in enumerate(FAMILY):
        for part, dim in ((0, 1), (1, 0)):
            joined = torch.cat([found["losses"][i][part] for found in on_two], dim)
            close(joined, whole[i][part], str(options))
    assert any(value[1].abs().max() > 0.1 for value in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: str, on_two: list[dict[str, Any]]) -> None:
    expected = train(0, kind)
    for found in on_two:
        for step, (a, b) in enumerate(zip(found[kind]["steps"], expected["steps"], strict=True)):
            for name in b:
                close(a[name], b[name], f"{name} at step {step}")
        for name, value in expected["state"].items():
            close(found[kind]["state"][name], value, name)


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
