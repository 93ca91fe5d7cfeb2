"""What a training computes in, and which of two precisions is the faster one here, told by trying."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from selfsight.engine.devices import device
from selfsight.engine.options import FASTEST, TrainerOptions
from selfsight.errors import UserError

WORTH_IT = 1.1  #: times as fast that bf16 has to be, since it is the less exact one
SECONDS = 2.0  #: that trying takes at most, once both have had two turns


def resolve_precision(choice: str | int, where: torch.device) -> str | int:
    """Lightning's word for a choice: ``auto`` is bf16-mixed on GPUs that compute in it, else 32-true."""
    if choice != "auto":
        return choice
    return "bf16-mixed" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def with_fastest(cfg: DictConfig) -> DictConfig:
    """A configuration in which ``trainer.precision=fastest`` has become the precision that it comes to here.

    The run keeps that one, and goes on in it wherever it is resumed.

    Raises:
        UserError: several processes were started from outside, each of which would try for itself.
    """
    if cfg.trainer.precision != FASTEST:
        return cfg
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "trainer.precision=fastest tries both on one process, and here are several; name one: "
            "trainer.precision=bf16-mixed or 32-true."
        )
    where = device(TrainerOptions.read(cfg.trainer).accelerator)
    chosen = resolve_precision("auto", where)
    if where.type == "cpu":
        gain = bf16_gain()
        chosen = "bf16-mixed" if gain >= WORTH_IT else "32-true"
        print(f"precision: {chosen}, since {bf16_told(gain)}", flush=True)
    cfg = cfg.copy()
    cfg.trainer.precision = chosen
    return cfg


def bf16_told(gain: float) -> str:
    """``bf16-mixed is 2.4 times as fast as float32 here``, or the other way round."""
    first, second, times = ("bf16-mixed", "float32", gain) if gain >= 1 else ("float32", "bf16-mixed", 1 / gain)
    return f"{first} is {times:.1f} times as fast as {second} here"


def bf16_gain(seconds: float = SECONDS) -> float:
    """Time of a training step in float32 over its time in bf16-mixed on the CPU.

    The step is that of a residual network's convolutions with batch norm, on maps of several sizes; the two take turns,
    and the quickest turn of each counts.
    """
    with torch.random.fork_rng(devices=[]):
        net, images = _network(), torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    quickest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 2 or time.perf_counter() < end:
        for dtype in quickest:
            spent = _seconds(lambda dtype=dtype: _step(net, images, dtype))  # type: ignore[misc]
            quickest[dtype] = spent if turn == 0 else min(quickest[dtype], spent)
        turn += 1
    return quickest[torch.float32] / quickest[torch.bfloat16]


def _network() -> nn.Module:
    net = nn.Sequential(_block(3, 64, 1), _block(64, 64, 1), _block(64, 128, 2), _block(128, 256, 2))
    return net.to(memory_format=torch.channels_last)


def _block(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _step(net: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = net(images)
    out.float().square().mean().backward()


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
