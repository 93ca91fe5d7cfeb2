"""Throughput on a GPU: views and training step from resident uint8 images, against a plain float32 loop.

Ours: views on the device, channels last, bfloat16 autocast, backbone and views compiled, fused optimiser. The plain
loop is the same method as written first: eager, float32, contiguous, views uncompiled.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from selfsight.backbones.registry import create
from selfsight.batch import Batch
from selfsight.datamodules.device_views import DeviceViews
from selfsight.datamodules.views import View
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.spark import SparK
from selfsight.methods.swav import SwAV

COLOUR = {
    "crop": "resized", "hflip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grayscale": 0.2,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip

#: backbone, stem, side of the images, images per batch, forward multiply-accumulates of one image
CASES = {
    "resnet18_32px": ("resnet18", "cifar", 32, 1024, 0.56e9),
    "resnet50_224px": ("resnet50", "imagenet", 224, 256, 4.1e9),
}
PEAK_FLOPS = {"H200": 790e12, "H100": 790e12, "A100": 280e12}  # dense bf16 that products reach


def run(steps: int = 20) -> list[dict]:
    torch.set_float32_matmul_precision("high")
    found = []
    for case, (name, stem, size, batch, macs) in CASES.items():
        for method, views in (("simclr", 2), ("swav", 2), ("spark", 1)):
            rates = {}
            for side in ("peer", "ours"):
                torch.cuda.reset_peak_memory_stats()
                rates[side] = throughput(method, views, name, stem, size, batch, steps, fast=side == "ours")
                rates[f"{side} memory"] = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.empty_cache()
            peak = next((v for k, v in PEAK_FLOPS.items() if k in torch.cuda.get_device_name()), None)
            share = f"{rates['ours'] * views * 6 * macs / peak:.0%} of the roofline" if peak else "roofline unknown"
            found.append(
                {
                    "name": f"gpu_{method}_{case}", "ours": rates["ours"], "peer": rates["peer"],
                    "ratio": rates["ours"] / rates["peer"], "unit": "images/s",
                    "memory_mib": [round(rates["ours memory"]), round(rates["peer memory"])], "check": share,
                }
            )  # fmt: skip
    return found


def build(method: str, backbone: nn.Module) -> Any:
    if method == "simclr":
        return SimCLRv2(
            backbone, temperature=0.5, projection_dim=128, projection_layers=2, reduction="sum_of_means",
            chunk_size=None, memory=0, memory_momentum=0.999, online_classes=0, classifier_decay=0.0,
        )  # fmt: skip
    from hydra import compose, initialize_config_dir

    from selfsight.cli import conf_dir
    from selfsight.jobs.build import build as instantiate

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("pretrain", overrides=[f"method={method}"])
    made: SparK | SwAV = instantiate(cfg.method, backbone=backbone)
    return made


def throughput(
    method: str, views: int, name: str, stem: str, size: int, batch: int, steps: int, *, fast: bool
) -> float:
    """Images per second of views and training together."""
    device = torch.device("cuda")
    pixels = torch.randint(0, 256, (4 * batch, 3, size, size), dtype=torch.uint8, device=device)
    maker = DeviceViews([View(size=size, count=views, **COLOUR)], compile=fast)
    module = build(method, create(name, stem=stem)).to(device).train()
    if fast:
        module = module.to(memory_format=torch.channels_last)
        if method != "spark":
            module.backbone.compile()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=fast or None)
    generator = torch.Generator(device).manual_seed(0)

    def step(number: int) -> None:
        module.begin_step(number)
        chosen = torch.randint(0, len(pixels), (batch,), device=device, generator=generator)
        made, boxes = maker(pixels[chosen], generator)
        if fast:
            made = [view.contiguous(memory_format=torch.channels_last) for view in made]
        with torch.autocast("cuda", torch.bfloat16, enabled=fast):
            loss = module.training_step(Batch(made, chosen, None, boxes), number)["loss"]
        optimizer.zero_grad()
        loss.backward()
        module.on_after_backward()
        optimizer.step()
        module.end_step()

    for number in range(5):
        step(number)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(steps):
        step(number)
    torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - start)
