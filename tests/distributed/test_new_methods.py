"""Two and three processes with their parts of a batch each train like one with the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.methods.barlow import BarlowTwins
from selfsight.methods.base import Method
from selfsight.methods.byol import BYOL
from selfsight.methods.dino import DINO
from selfsight.methods.lejepa import LeJEPA
from selfsight.methods.mae import MAE
from selfsight.methods.mocov3 import MoCoV3
from selfsight.methods.simsiam import SimSiam
from selfsight.methods.vicreg import VICReg
from selfsight.nn.batchnorm import SharedBatchNorm1d
from selfsight.nn.distributed import all_reduce_sum, rank, world_size
from selfsight.optim import LARS
from selfsight.optim.schedule import Constant, Cosine

from ..small import SmallNet, batches, prepare
from .spawn import run_on

B, STEPS = 6, 3
TORCH_LARS = partial(LARS, momentum=0.9, weight_decay=1e-4, variant="torch")
ADAMW = partial(torch.optim.AdamW, weight_decay=0.05)


class SharedNoiseMAE(MAE):
    """Hides the same patches of an image however the batch is cut."""

    def draw_noise(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.step)
        noise = torch.rand(B, self.length, generator=generator, dtype=torch.float64)
        return noise.chunk(world_size())[rank()]


def net() -> nn.Module:
    return SmallNet(norm=nn.Identity)


def vit(name: str) -> nn.Module:
    return create(name, img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)


METHODS: dict[str, tuple[Callable[[], Method], Any, float, list[int]]] = {
    "byol": (lambda: BYOL(net(), hidden_dim=9, dim=5), TORCH_LARS, 1.0, [16, 16]),
    "simsiam": (lambda: SimSiam(net(), dim=8, predictor_dim=3), partial(torch.optim.SGD, momentum=0.9), 0.05, [16, 16]),
    "mocov3": (lambda: MoCoV3(net(), hidden_dim=9, dim=5, temperature=0.2), TORCH_LARS, 1.0, [16, 16]),
    "mocov3_vit": (lambda: MoCoV3(vit("vit_tiny_moco"), hidden_dim=9, dim=5, temperature=0.2), ADAMW, 0.01, [16, 16]),
    "vicreg": (lambda: VICReg(net(), expander=[9, 6]), TORCH_LARS, 1.0, [16, 16]),
    "barlow": (lambda: BarlowTwins(net(), projector=[9, 6]), TORCH_LARS, 1.0, [16, 16]),
    "lejepa": (lambda: LeJEPA(net(), embedding_dim=6, projector=[9, 4], slices=8), ADAMW, 0.01, [16, 16, 8]),
    "dino": (
        lambda: DINO(vit("vit_tiny_dino"), out_dim=7, hidden_dim=9, bottleneck_dim=4), ADAMW, 0.01, [16, 16, 8],
    ),
    "mae": (
        lambda: SharedNoiseMAE(vit("vit_tiny_mae"), decoder_dim=8, decoder_depth=1, decoder_heads=2), ADAMW, 0.01, [16],
    ),
}  # fmt: skip


def make(name: str) -> Method:
    torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
    torch.manual_seed(0)
    build, optimizer, lr, _ = METHODS[name]
    method = build().double()
    for module in method.modules():  # BatchNorm over all processes is the trainer's part on GPUs
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SharedBatchNorm1d
    schedules = {"teacher_momentum": Cosine(0.9, 1.0), "teacher_temperature": Constant(0.05)}
    return prepare(method, optimizer, lr, 2, 2, **schedules)


def train_all(process: int) -> dict[str, Any]:
    return {name: train(process, name) for name in METHODS}


def train(process: int, name: str) -> dict[str, Any]:
    method = make(name)
    optimizer, W = method.configure_optimizers(), world_size()
    steps, data = [], batches(METHODS[name][3], B, 2, dtype=torch.float64)
    for step in range(STEPS):
        batch = data[step % 2]
        local = Batch([v.chunk(W)[process] for v in batch.views], batch.indices.chunk(W)[process])
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(local, 0)
        result["loss"].backward()
        found = {key: all_reduce_sum(value.detach()) / W for key, value in result.items()}
        for key, p in method.named_parameters():
            if p.grad is not None:
                p.grad = all_reduce_sum(p.grad) / W  # as data parallel training does
                found[f"gradient of {key}"] = p.grad.clone()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        steps.append(found)
    state = {key: value for key, value in method.state_dict().items() if value.is_floating_point()}
    return {"steps": steps, "state": state}


#: monitors that are averages over a process's own images and no sums over all
OWN = ("prediction_std",)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_equal_one(processes: int) -> None:
    torch.set_default_dtype(torch.float32)
    whole, ranks = train_all(0), run_on(processes, train_all)
    for name, expected in whole.items():
        moved = max(float(g.abs().max()) for key, g in expected["steps"][0].items() if key.startswith("gradient"))
        assert moved > 1e-3, name
        for found in ranks:
            for step, (a, b) in enumerate(zip(found[name]["steps"], expected["steps"], strict=True)):
                for key in b:
                    if key not in OWN:
                        close(a[key], b[key], f"{name}: {key} at step {step}")
            for key, value in expected["state"].items():
                close(found[name]["state"][key], value, f"{name}: {key}")


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}")
