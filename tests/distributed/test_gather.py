"""Gathering over two processes equals one process that holds the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from selfsight.nn.distributed import all_reduce_max, all_reduce_sum, gather, gather_without_grad, rank, world_size

from .spawn import run_on


def anchors_against_all(local: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(local @ everyone.T, dim=1).mean()


def on_each_rank(r: int, x: torch.Tensor) -> dict[str, object]:
    assert (rank(), world_size()) == (r, 2)
    local = x.chunk(2)[r].clone().requires_grad_()
    everyone = gather(local)
    anchors_against_all(local, everyone).backward()
    strided = torch.arange(12).reshape(3, 4).T + 100 * r  # not contiguous, integers
    return {
        "gathered": everyone.detach(),
        "gradient": local.grad,
        "integers": gather_without_grad(strided),
        "needs_grad": gather_without_grad(local).requires_grad,
        "sum": all_reduce_sum(local),
        "max": all_reduce_max(local),
        "untouched": torch.equal(local.detach(), x.chunk(2)[r]),
        "backend": dist.get_backend(),
    }


def test_two_processes_equal_one() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = x.clone().requires_grad_()
    anchors_against_all(whole, gather(whole)).backward()
    ranks = run_on(2, on_each_rank, x)
    for result in ranks:
        assert torch.equal(result["gathered"], x)
        assert result["untouched"]
        assert not result["needs_grad"]
        torch.testing.assert_close(result["sum"], x[:3] + x[3:])
        torch.testing.assert_close(result["max"], torch.maximum(x[:3], x[3:]))
        block = torch.arange(12).reshape(3, 4).T
        assert torch.equal(result["integers"], torch.cat([block, block + 100]))
    # data parallel training averages over ranks, hence the half
    gradient = torch.cat([result["gradient"] for result in ranks]) / 2
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-12)


def test_one_process_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    for function in (gather_without_grad, all_reduce_sum, all_reduce_max):
        assert torch.equal(function(x), x)
        assert not function(x).requires_grad
