"""Two processes with half of a batch each train like one with the whole of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.methods.base import Method
from selfsight.methods.deepclusterv2 import DeepClusterV2
from selfsight.methods.swav import SwAV
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.optim import lars

from ..small import SmallNet, batches, prepare
from .spawn import run_on

B, STEPS = 6, 7
LARC = partial(lars.LARC, momentum=0.9, weight_decay=1e-4)


def make(kind: str) -> Method:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    backbone = SmallNet(norm=nn.Identity)
    common: dict[str, Any] = {"hidden_dim": 0, "dim": 5, "temperature": 0.1, "crops_for_assign": [0, 1]}
    method: Method
    if kind == "swav":
        method = SwAV(
            backbone, num_prototypes=7, epsilon=0.05, sinkhorn_iterations=3, hard_codes=False,
            freeze_prototypes_steps=1, queue_length=2 * B, queue_start_epoch=1, batch_size=B, **common,
        )  # fmt: skip
    else:
        method = DeepClusterV2(backbone, num_prototypes=[3, 4], kmeans_iterations=4, num_images=2 * B, **common)
    return prepare(method.double(), LARC, 1.0, 2, 4)


def train_both(rank: int) -> dict[str, Any]:
    return {kind: train(rank, kind) for kind in ("swav", "deepcluster")}


def train(rank: int, kind: str) -> dict[str, Any]:
    method = make(kind)
    optimizer = method.configure_optimizers()
    steps, data = [], batches([16, 16, 8], B, 2, dtype=torch.float64)
    for step in range(STEPS):
        batch = data[step % 2]
        W = world_size()
        local = Batch([v.chunk(W)[rank] for v in batch.views], batch.indices.chunk(W)[rank])
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(local, 0)
        result["loss"].backward()
        for p in method.parameters():  # as data parallel training does
            if p.grad is not None:
                p.grad = all_reduce_sum(p.grad) / W
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        steps.append({name: all_reduce_sum(value) / W for name, value in result.items()})
    state = {name: value for name, value in method.state_dict().items() if value.is_floating_point()}
    return {"steps": steps, "state": state}


def test_two_processes_equal_one() -> None:
    whole, ranks = train_both(0), run_on(2, train_both)
    for kind, expected in whole.items():
        for found in ranks:
            for step, (a, b) in enumerate(zip(found[kind]["steps"], expected["steps"], strict=True)):
                for name in b:
                    close(a[name], b[name], f"{kind}: {name} at step {step}")
            for name, value in expected["state"].items():
                close(found[kind]["state"][name], value, f"{kind}: {name}")


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
