"""A training step never waits for the device: tried on tensors without values, of which nothing can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight import cli
from selfsight.contracts import Batch, SemiBatch
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.engine import build, sizes

FEW = [
    f"labels.per_class=2 method={name}"
    for name in ("simmatchv2", "fixmatch", "flexmatch", "freematch", "mixmatch mu=1", "comatch", "simmatch")
]
RUNS = [
    *(f"method={name}" for name in ("simclrv2", "deepclusterv2", "pixpro", "supcon", "supce", "rotation", "spark")),
    "method=spark method.engine=dense",
    "method=swav method.queue_length=16 method.queue_start_epoch=0",
    *FEW,
]


class NoTransfers(TorchDispatchMode):
    """Refuses what brings numbers from the host to the device: a copy out of pageable memory waits for its end."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        from_host = any(x.device.type == "cpu" for x in tensors)
        on_device = any(x.is_meta for x in tensors)
        assert not (on_device and (from_host or "lift_fresh" in str(func))), f"{func} brings numbers to the device"
        return out


def moved(batch: Any) -> Any:
    """The batch on a device that holds no values."""
    if isinstance(batch, SemiBatch):
        return SemiBatch(moved(batch.labelled), moved(batch.unlabelled))
    assert isinstance(batch, Batch)
    return batch.to("meta")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_no_step_waits_for_the_device(run: str) -> None:
    words = ["batch_size=8", "limit_images=160", "trainer.accelerator=cpu", *run.split()]
    cfg = cli.compose("pretrain", cli.checked("pretrain", words, sweep=False))
    data = build.datamodule(cfg)
    method = build.method(cfg, data).configure(build.recipe(cfg), sizes.length(cfg, data)).to("meta")
    batch = moved(next(iter(data.train_dataloader())))
    optimizer = method.configure_optimizers()
    for step in range(3):
        method.begin_step(step)
        with NoTransfers() if step else nullcontext():  # tables are brought over once
            found = method.training_step(batch, step)
            found["loss"].backward()
            method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        with NoTransfers() if step else nullcontext():
            method.end_step()
        assert all(value.is_meta for value in found.values()), "every figure stays on the device"


@pytest.mark.slow
@pytest.mark.parametrize("group", ["simclr", "simclr_small", "swav", "pixpro", "fixmatch", "mixmatch", "simmatchv2"])
def test_no_view_waits_for_the_device(group: str) -> None:
    cfg = cli.compose("pretrain", ["dataset=cifar10", f"views={group}"])
    images = torch.empty(8, 3, 40, 36, dtype=torch.uint8, device="meta")
    make = DeviceViews(list(build.views(cfg).values()))
    make(images)  # tables are brought over once
    with NoTransfers():
        views, boxes = make(images)
    assert all(x.is_meta for x in (*views, *boxes))
