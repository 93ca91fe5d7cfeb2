"""Two processes with half of a batch each take the SparK step of one with the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfsight.losses.spark import masked_patch_loss
from selfsight.nn.distributed import rank, world_size
from selfsight.nn.sparse.layers import Mask, MaskedBatchNorm2d

from ..spark_models import images, random_mask, spark
from .spawn import run_on


def train(_: int, engine: str, name: str) -> dict[str, Tensor]:
    """Loss, gradients averaged over processes, and buffers after one step."""
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    method = spark(name, engine=engine).double().train()
    mine = slice(rank() * 4 // world_size(), (rank() + 1) * 4 // world_size())
    x, active = images(4, 96, 96).double(), random_mask(4, (3, 3), 4)
    loss = masked_patch_loss(method.reconstruct(x[mine], active[mine]).image, x[mine], active[mine])
    (loss / world_size()).backward()
    found = {"loss": loss.detach() / world_size()}
    for key, parameter in method.named_parameters():
        if parameter.grad is not None:
            found[f"grad {key}"] = parameter.grad
    if world_size() > 1:
        for value in found.values():
            torch.distributed.all_reduce(value)
    return found | {key: buffer.clone() for key, buffer in method.named_buffers()}


@pytest.mark.parametrize(
    ("engine", "name"), [("dense", "test_resnet"), ("packed", "test_resnet"), ("packed", "test_convnext")]
)
def test_two_processes_equal_one(engine: str, name: str) -> None:
    one = train(0, engine, name)
    for result in run_on(2, train, engine, name):
        assert result.keys() == one.keys()
        for key, value in one.items():
            scale = max(1.0, float(value.abs().max()))
            assert (result[key] - value).abs().max() <= 1e-9 * scale, key


def normalise(_: int) -> dict[str, Tensor]:
    """Masks of different size on each process: counts have to be shared too."""
    torch.manual_seed(0)
    norm = MaskedBatchNorm2d(3, sync=True).double().train()
    active = random_mask(2, (4, 4), 3)
    active[1] |= random_mask(1, (4, 4), 9, seed=5)[0]
    mine = slice(rank() * 2 // world_size(), (rank() + 1) * 2 // world_size())
    x = images(2, 8, 8).double()[mine].requires_grad_()
    y = norm(x, Mask(active[mine]))
    (y * images(2, 8, 8, seed=1).double()[mine]).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "mean": norm.running_mean, "var": norm.running_var}


def test_statistics_of_unequal_processes() -> None:
    one = normalise(0)
    first, second = run_on(2, normalise)
    for key in ("y", "dx"):
        torch.testing.assert_close(torch.cat([first[key], second[key]]), one[key], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first["dw"] + second["dw"], one["dw"], rtol=1e-10, atol=1e-12)
    for key in ("mean", "var"):
        torch.testing.assert_close(first[key], one[key], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second[key], one[key], rtol=1e-12, atol=1e-12)
