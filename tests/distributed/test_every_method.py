"""Two to four processes that share a batch learn what one process learns from all of it: every method there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight.methods.base import Method
from selfsight.methods.matryoshka import Matryoshka
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.swav import SwAV
from selfsight.nn.distributed import all_reduce_sum, world_size

from ..every_method import batch_of, draws_of_the_whole, every_method, make, share, without_batch_statistics
from .spawn import run_on

STEPS = 3
EXACT = [kind for kind in every_method() if not kind.per_process]
#: with heads=matryoshka, of all that is compared one whose negatives are gathered and one with queues
NESTED = [SimCLRv2, SwAV]
NAMES = [*(kind.__name__ for kind in EXACT), *(f"{kind.__name__}, nested" for kind in NESTED)]


def learn(rank: int, kind: type[Method], heads: Matryoshka | None = None) -> dict[str, Any]:
    """Losses, and everything the method is at the end, after steps of data-parallel training in float64."""
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    method, size = make(kind)
    method = method if heads is None else heads.on(method)
    torch.set_default_dtype(torch.float64)
    method = without_batch_statistics(method.double(), but_synchronised=True)
    start = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer, W, losses = method.configure_optimizers(), world_size(), []
    for step in range(STEPS):
        batch = share(batch_of(method, size, step), rank, W)
        method.begin_step(step)
        optimizer.zero_grad()
        with draws_of_the_whole(step, rank, W):
            loss = method.training_step(batch, step)["loss"]
        loss.backward()
        for p in method.parameters():  # as data parallel training does
            if p.grad is not None:
                p.grad = all_reduce_sum(p.grad) / W
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        losses.append(all_reduce_sum(loss.detach()) / W)
    moved = [name for name, value in method.state_dict().items() if not torch.equal(value, start[name])]
    return {"losses": torch.stack(losses), "state": method.state_dict(), "moved": moved}


def learn_all(rank: int) -> dict[str, Any]:
    nested = {f"{kind.__name__}, nested": learn(rank, kind, Matryoshka(dims=[2, 4])) for kind in NESTED}
    return {kind.__name__: learn(rank, kind) for kind in EXACT} | nested


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    try:
        return learn_all(0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_on(request.param, learn_all)


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_equal_one(name: str, one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    expected = one[name]
    assert any(part.startswith("backbone.") for part in expected["moved"]), "a network that stays compares nothing"
    for rank, found in enumerate(several):
        close(found[name]["losses"], expected["losses"], f"{name}: losses")
        for part, value in expected["state"].items():
            close(found[name]["state"][part], value, f"{name}: {part} of process {rank}")


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


def test_a_method_that_goes_by_its_processs_share_says_so() -> None:
    assert {kind.__name__ for kind in every_method()} - {kind.__name__ for kind in EXACT} == {"MixMatch", "ReMixMatch"}
