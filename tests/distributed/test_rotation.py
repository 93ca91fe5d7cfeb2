"""Two processes with half of a batch each train rotation prediction like one with the whole of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from selfsight.contracts import Batch
from selfsight.methods.rotation import Rotation
from selfsight.nn.distributed import all_reduce_sum, world_size

from ..small import SmallNet, batches, prepare
from .spawn import run_on

B, STEPS = 6, 5
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train(rank: int) -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    method = Rotation(SmallNet(norm=nn.Identity), hidden_dims=[], map_side=2, decay="all").double()
    prepare(method, SGD, 0.1, 2, 3)
    optimizer, W = method.configure_optimizers(), world_size()
    steps, data = [], batches([16], B, 2, dtype=torch.float64)
    for step in range(STEPS):
        batch = data[step % 2]
        method.begin_step(step)
        optimizer.zero_grad()
        local = Batch([batch.views[0].chunk(W)[rank]], batch.indices.chunk(W)[rank])
        result = method.training_step(local, 0)
        result["loss"].backward()
        for p in method.parameters():  # as data parallel training does
            assert p.grad is not None
            p.grad = all_reduce_sum(p.grad) / W
        optimizer.step()
        steps.append({name: all_reduce_sum(value) / W for name, value in result.items()})
    return {"steps": steps, "state": method.state_dict()}


def test_two_processes_equal_one() -> None:
    expected = train(0)
    assert expected["steps"][0]["loss"] != expected["steps"][-1]["loss"]
    for found in run_on(2, train):
        for a, b in zip(found["steps"], expected["steps"], strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)
        for name, value in expected["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-9)
