"""Gradients cached over chunks on two processes, under PyTorch's data parallelism: those of one whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selfsight.contracts import Batch
from selfsight.methods.base import Method
from selfsight.methods.mocov3 import MoCoV3
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.supcon import SupCon
from selfsight.nn.distributed import world_size
from selfsight.nn.in_chunks import in_chunks

from ..every_method import batch_of, make, share, without_batch_statistics
from .spawn import run_on

CHUNK = 2
KINDS: list[type[Method]] = [SimCLRv2, SupCon, MoCoV3]


class Loss(nn.Module):
    """A training step as a forward, which data parallelism wants."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> Tensor:
        return self.method.training_step(batch, 0)["loss"]


def gradients(rank: int, kind: type[Method], chunk: int | None) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    method, size = make(kind)
    torch.set_default_dtype(torch.float64)
    method = without_batch_statistics(method.double(), but_synchronised=True)
    if chunk is not None:
        in_chunks(method.backbone, chunk)
    batch = share(batch_of(method, size, 0), rank, world_size())
    method.begin_step(0)
    step: nn.Module = Loss(method)
    if world_size() > 1:
        step = DistributedDataParallel(step)
    step(batch).backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_two_processes_with_chunks_equal_one_without(kind: type[Method]) -> None:
    try:
        expected = gradients(0, kind, None)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in run_on(2, gradients, kind, CHUNK):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")
