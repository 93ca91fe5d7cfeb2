"""Two processes that share a batch learn what one process learns from all of it: losses, weights, banks, monitors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selfsight.contracts import Batch, SemiBatch

from ..semi_supervised import Net, batch, make, no_norm
from .spawn import run_on

STEPS = 6  # the second epoch, in which all terms are there, starts with the fifth
#: without statistics over the batch every row stands for itself, and halves add up to the whole
EXACT = {
    "simmatchv2": {"norm_feat": True, "tau": 0.4},
    "simmatchv2, multi-crop": {"da_m": None, "tau": 0.4},
    "fixmatch": {"tau": 0.4},
    "flexmatch": {"tau": 0.4},
    "freematch": {"w_f": 0.0},  # fairness compares means over the local batch, as in the authors' code
    "simmatch": {"teacher": True, "tau": 0.3},
}


def widened(whole: SemiBatch, copies: int) -> SemiBatch:
    """More strong views: the same, mirrored."""
    weak, strong = whole.unlabelled.views
    views = [weak, strong, *(strong.flip(-1) for _ in range(copies - 1))]
    return SemiBatch(whole.labelled, Batch(views, whole.unlabelled.indices, whole.unlabelled.labels))


def share(whole: SemiBatch, rank: int, world: int) -> SemiBatch:
    def part(b: Batch) -> Batch:
        assert b.labels is not None
        views = [view.chunk(world)[rank] for view in b.views]
        return Batch(views, b.indices.chunk(world)[rank], b.labels.chunk(world)[rank])

    return SemiBatch(part(whole.labelled), part(whole.unlabelled))


def learn(rank: int, world: int, case: str) -> dict[str, Any]:
    name = case.split(",")[0]
    method = make(name, partial(Net, no_norm), **EXACT[case]).double()
    optimizer = method.configure_optimizers()
    method.forward = method.training_step  # type: ignore[method-assign]  # what DDP calls
    module: nn.Module = DistributedDataParallel(method) if world > 1 else method
    losses = []
    for step in range(STEPS):
        whole = batch(step, name)
        if "multi-crop" in case:
            whole = widened(whole, 2)
        for part in (whole.labelled, whole.unlabelled):
            part.views = [view.double() for view in part.views]
        method.begin_step(step)
        result = module(share(whole, rank, world), step)
        optimizer.zero_grad()
        result["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        losses.append(
            torch.stack(
                [result[key].detach() for key in sorted(result) if key.startswith("loss") and key != "loss_fair"]
            )
        )
    return {"losses": torch.stack(losses), "state": method.state_dict()}


def test_two_processes_equal_one() -> None:
    cases = list(EXACT)
    ranks = run_on(2, learn_all, cases)
    torch.set_default_dtype(torch.float64)
    try:
        single = {case: learn(0, 1, case) for case in cases}
    finally:
        torch.set_default_dtype(torch.float32)
    for case in cases:
        first, second = (r[case] for r in ranks)
        one = single[case]
        assert (one["losses"].abs().amax(0) > 0).all(), f"{case}: a term that is never there compares nothing"
        close(f"{case}: losses", (first["losses"] + second["losses"]) / 2, one["losses"])
        for key, value in one["state"].items():
            close(f"{case}: {key}", first["state"][key], value)
            close(f"{case}: {key} of the second process", second["state"][key], value)


def learn_all(rank: int, cases: list[str]) -> dict[str, Any]:
    return {case: learn(rank, 2, case) for case in cases}


def close(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def banks_stay(rank: int) -> dict[str, bool]:
    """A process whose banks differ keeps them through DDP's forward; statistics of BatchNorm come from the first."""
    method = make("simmatchv2").double()
    method.l_bank.add_(rank)
    method.u_bank.data.add_(rank)
    method.u_labels.data.add_(rank)
    statistics = method.backbone.norm.running_mean
    statistics.add_(rank)
    before = {name: getattr(method, name) for name in ("u_bank", "u_labels")}
    kept = {"l_bank": method.l_bank.clone(), **{name: queue.data.clone() for name, queue in before.items()}}
    method.forward = lambda: sum(p.sum() for p in method.parameters())  # type: ignore[method-assign]
    DistributedDataParallel(method)()
    return {
        "l_bank": torch.equal(method.l_bank, kept["l_bank"]),
        **{name: torch.equal(queue.data, kept[name]) for name, queue in before.items()},
        "statistics": bool((statistics == 0).all()),
    }


def test_banks_are_not_broadcast_and_statistics_are() -> None:
    for kept in run_on(2, banks_stay):
        assert kept == {"l_bank": True, "u_bank": True, "u_labels": True, "statistics": True}
