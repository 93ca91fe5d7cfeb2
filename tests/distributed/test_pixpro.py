"""Two processes with half of a batch each train like one with the whole of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from selfsight.contracts import Batch
from selfsight.methods.pixpro import PixPro
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.optim.lars import LARS
from selfsight.optim.schedule import Cosine

from ..small import SmallNet, batches, prepare
from .spawn import run_on

OPTIONS: dict[str, dict[str, Any]] = {"pixpro": {"instance_weight": 1.0}, "pixcontrast": {"instance_weight": 0.0}}


def train_all(rank: int) -> dict[str, Any]:
    return {loss: train(rank, loss) for loss in OPTIONS}


def train(rank: int, loss: Any) -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    method = PixPro(
        SmallNet(), hidden_dim=9, dim=6, loss=loss, exponent=2.0, clamp=0.0, transform_layers=2, normalise_value=True,
        pos_ratio=0.7, skip_empty=False, temperature=0.3, decay="kernels", **OPTIONS[loss],
    )  # fmt: skip
    optimizer_class = partial(LARS, momentum=0.9, weight_decay=1e-4, eps=1e-8, variant="torch")
    prepare(method.double(), optimizer_class, 1.0, 2, 2, teacher_momentum=Cosine(0.9, 1.0))
    method.eval()  # BatchNorm over several processes is the trainer's part
    optimizer = method.configure_optimizers()
    steps, data, W = [], batches([16, 16], 6, 2, dtype=torch.float64), world_size()
    for step in range(4):
        batch = data[step % 2]
        assert batch.boxes is not None
        views, boxes = ([v.chunk(W)[rank] for v in tensors] for tensors in (batch.views, batch.boxes))
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(Batch(views, batch.indices.chunk(W)[rank], boxes=boxes), 0)
        result["loss"].backward()
        for p in method.parameters():  # as data parallel training does
            if p.grad is not None:
                p.grad = all_reduce_sum(p.grad) / W
        optimizer.step()
        method.end_step()
        steps.append(all_reduce_sum(result["loss"]) / W)
    return {"losses": torch.stack(steps), "state": method.state_dict()}


def test_two_processes_equal_one() -> None:
    whole, ranks = train_all(0), run_on(2, train_all)
    for loss, expected in whole.items():
        for found in ranks:
            torch.testing.assert_close(found[loss]["losses"], expected["losses"], rtol=1e-10, atol=1e-10)
            for name, value in expected["state"].items():
                torch.testing.assert_close(found[loss]["state"][name], value, rtol=1e-10, atol=1e-10, msg=name)
