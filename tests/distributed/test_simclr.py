"""Two processes with half of a batch each train like one with the whole of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.optim import LARS

from ..small import SmallNet, batches, prepare
from .spawn import run_on

B, STEPS = 6, 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.1},
    "chunked": {"temperature": 0.5, "chunk_size": 4, "reduction": "mean_2n"},
    "memory": {"temperature": 0.2, "memory": 30},
}


def make(kind: str) -> SimCLRv2:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "projection_dim": 4, "projection_layers": 2, "reduction": "sum_of_means", "chunk_size": None,
        "memory": 0, "memory_momentum": 0.9, "online_classes": 0, "classifier_decay": 0.0,
    }  # fmt: skip
    method = SimCLRv2(SmallNet(norm=nn.Identity), **{**settings, **KINDS[kind]}).double()
    for layer in method.projector:  # larger than they start, as training makes them
        layer.linear.weight.data *= 100
    prepare(method, partial(LARS, momentum=0.9, weight_decay=1e-4), 0.01, 2, 2)
    return method.eval()  # BatchNorm of the head by its running statistics: what samples share is the loss alone


def train_all(rank: int) -> dict[str, Any]:
    return {kind: train(rank, kind) for kind in KINDS}


def train(rank: int, kind: str) -> dict[str, Any]:
    method = make(kind)
    optimizer = method.configure_optimizers()
    steps, data = [], batches([16, 16], B, 2, dtype=torch.float64)
    for step in range(STEPS):
        batch, W = data[step % 2], world_size()
        local = Batch([v.chunk(W)[rank] for v in batch.views], batch.indices.chunk(W)[rank])
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(local, 0)
        result["loss"].backward()
        gradients = {}
        for name, p in method.named_parameters():
            if p.grad is not None:
                p.grad = all_reduce_sum(p.grad) / W  # as data parallel training does
                gradients[f"gradient of {name}"] = p.grad.clone()
        optimizer.step()
        method.end_step()
        monitors = {name: all_reduce_sum(value.detach()) / W for name, value in result.items()}
        steps.append({**monitors, **gradients})
    return {"steps": steps, "state": method.state_dict()}


def test_two_processes_equal_one() -> None:
    whole, ranks = train_all(0), run_on(2, train_all)
    for kind, expected in whole.items():
        assert any(
            name.startswith("gradient") and float(g.abs().max()) > 1e-3 for name, g in expected["steps"][0].items()
        )
        for found in ranks:
            for step, (a, b) in enumerate(zip(found[kind]["steps"], expected["steps"], strict=True)):
                for name in b:
                    close(a[name], b[name], f"{kind}: {name} at step {step}")
            for name, value in expected["state"].items():
                close(found[kind]["state"][name], value, f"{kind}: {name}")


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
