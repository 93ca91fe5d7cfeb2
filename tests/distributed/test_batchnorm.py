"""BatchNorm over the images of all processes on CPUs is that of one process which holds the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.nn.batchnorm import BiasedBatchNorm2d, ReducedBatchNorm
from selfsight.nn.distributed import all_reduce_sum, rank, world_size

from .spawn import run_on

#: rows of the whole batch that each of two processes holds: equally many, and not
SHARES = {"even": (4, 4), "uneven": (5, 3)}


def network() -> nn.Sequential:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), BatchNormAct2d(5, momentum=0.3),
        nn.Conv2d(5, 6, 1), BiasedBatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(6, affine=False, momentum=None), nn.Linear(6, 2),
    )  # fmt: skip
    return net.double()


def learn(_: int) -> dict[str, dict[str, Any]]:
    return {name: trained(share) for name, share in SHARES.items()}


def trained(share: tuple[int, int]) -> dict[str, Any]:
    """Three steps of data-parallel training on this process's rows."""
    net, W = network(), world_size()
    for i, norm in enumerate(net):
        if W > 1 and isinstance(norm, _BatchNorm):
            net[i] = ReducedBatchNorm(norm)
    optimizer, grads = torch.optim.SGD(net.parameters(), lr=0.1), []
    for step in range(3):
        x = torch.randn(8, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mine = (x.split(share)[rank()] if W > 1 else x).clone().requires_grad_()
        optimizer.zero_grad()
        loss = net(mine).square().sum() / len(x) * W
        loss.backward()
        for p in net.parameters():
            p.grad = all_reduce_sum(p.grad) / W
        optimizer.step()
        grads.append(mine.grad / W)
    with torch.no_grad():
        seen = net.eval()(torch.ones(1, 3, 7, 7, dtype=torch.float64))
    return {"state": net.state_dict(), "grads": torch.stack(grads, 1), "seen": seen}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_on(2, learn)


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_are_one(name: str, two: list[dict[str, Any]]) -> None:
    one = trained(SHARES[name])
    for found in (process[name] for process in two):
        assert found["state"].keys() == one["state"].keys()
        for key, value in one["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["seen"], one["seen"], rtol=1e-10, atol=1e-10)
    grads = torch.cat([process[name]["grads"] for process in two])
    torch.testing.assert_close(grads, one["grads"], rtol=1e-10, atol=1e-12)


def test_on_one_process_it_is_pytorchs() -> None:
    from selfsight.engine.devices import SyncNorms  # here: processes that are spawned need not wait for Lightning

    net, same = network().float(), network().float()
    x = torch.randn(6, 3, 7, 7)
    norms = SyncNorms("cpu")
    norms.apply(same)
    assert isinstance(same[4], ReducedBatchNorm), "timm's, with its activation"
    torch.testing.assert_close(same[:9](x), net[:9](x))
    assert same.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    kinds = [type(part) for part in net.modules()]
    assert [type(part) for part in norms.revert(same).modules()] == kinds
