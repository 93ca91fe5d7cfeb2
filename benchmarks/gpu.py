"""Throughput on a GPU: views and training step from resident uint8 images, against a plain loop and lightly's modules.

Everyone makes the views with the same code. Ours: channels last, bfloat16 autocast, networks and views compiled, fused
optimiser; the same with CUDA graphs. The plain loop is our method as written first: eager, float32, contiguous, views
uncompiled. lightly's modules (its heads and losses; it has no SparK) run eager under bfloat16 autocast, as its own
benchmarks do. Then our command trains from a folder of JPEGs, and the share of time between its steps is taken.

    python benchmarks/gpu.py --device cpu     # one small step of each, uncompiled: shows that everything runs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import end_to_end
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.cli import compose
from selfsight.contracts import Batch
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.view import View
from selfsight.engine.nodes import build
from selfsight.engine.options import TrainerOptions
from selfsight.engine.performance import GraphSteps, apply_performance_options
from selfsight.methods.base import Method

COLOUR = {
    "crop": "resized", "hflip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grayscale": 0.2,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
PEAK_FLOPS = {"H200": 790e12, "H100": 790e12, "A100": 280e12}  # dense bf16 that products reach
VIEWS = {"simclrv2": 2, "swav": 2, "spark": 1}


@dataclass(frozen=True)
class Case:
    """A backbone and its images: side, images per batch, forward multiply-accumulates of one image."""

    name: str
    backbone: str
    stem: str
    size: int
    batch: int
    macs: float


CASES = (
    Case("resnet18_32px", "resnet18", "cifar", 32, 1024, 0.56e9),
    Case("resnet50_224px", "resnet50", "imagenet", 224, 256, 4.1e9),
)
SMALL = (Case("resnet18_32px", "resnet10_slim", "cifar", 32, 4, 0.56e9),)
#: images a second, by method and case; share of the time of a training between its steps
GOALS = {("simclrv2", "resnet18_32px"): 25_000.0, ("simclrv2", "resnet50_224px"): 3_500.0}
WAIT = 0.05

#: a training step: views ``[B, 3, H, W]`` to the loss; what comes before and after it is in `Way`
Loss = Callable[[list[Tensor], int], Tensor]


@dataclass(frozen=True)
class Way:
    """How a step is run."""

    precision: torch.dtype
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    fused: bool = False
    lightly: bool = False


PLAIN = Way(torch.float32)
LIGHTLY = Way(torch.bfloat16, lightly=True)
OURS = Way(torch.bfloat16, channels_last=True, compile=True, fused=True)
GRAPHS = Way(torch.bfloat16, channels_last=True, compile=True, graphs=True, fused=True)


def run(device: torch.device | None = None, cases: tuple[Case, ...] = CASES, steps: int = 20) -> list[dict]:
    """For each method and case a row against the plain loop, against lightly, and CUDA graphs against none; goals."""
    device = device or torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    found = []
    for case in cases:
        for method, views in VIEWS.items():
            ways = {"ours": OURS, "plain": PLAIN, "graphs": GRAPHS, "lightly": LIGHTLY}
            if method == "spark" or not end_to_end.has_lightly():
                del ways["lightly"]
            rates = {name: throughput(device, method, case, way, steps) for name, way in ways.items()}
            pairs = [("ours", "plain"), ("ours", "lightly"), ("graphs", "ours")]
            for first, second in [pair for pair in pairs if set(pair) <= set(rates)]:
                (a, its_memory), (b, other_memory) = rates[first], rates[second]
                found.append(
                    {
                        "name": f"gpu_{method}_{case.name}_{first}_{second}", "ours": a, "peer": b, "ratio": a / b,
                        "unit": "images/s", "memory_mib": [round(its_memory), round(other_memory)],
                        "check": share(device, a * views * 6 * case.macs),
                    }
                )  # fmt: skip
            if (method, case.name) in GOALS:
                best, goal = max(rates["ours"][0], rates["graphs"][0]), GOALS[method, case.name]
                found.append(
                    {
                        "name": f"gpu_{method}_{case.name}_goal", "ours": best, "peer": goal, "ratio": best / goal,
                        "unit": "images/s", "target": 1.0, "check": "the peer is the goal",
                    }
                )  # fmt: skip
    return [*found, waiting(device)]


def waiting(device: torch.device) -> dict:
    """A training of our command from a folder of JPEGs: the share of time between its steps, beside the goal."""
    gpu = device.type == "cuda"
    case = end_to_end.CASES["simclr32"]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        end_to_end.drawn(root, *(() if gpu else (32, 8)))
        figures = end_to_end.train(
            case if gpu else end_to_end.small(case), "ours", root, Path(place), steps=200 if gpu else 3,
            accelerator="gpu" if gpu else "cpu",
        )  # fmt: skip
    return {
        "name": "gpu_wait", "ours": figures["wait"], "peer": WAIT, "ratio": WAIT / max(figures["wait"], 1e-6),
        "unit": "of the time between steps", "target": 1.0,
        "check": f"the peer is the goal; {figures['images_s']:.0f} images/s, batches of {case.batch}",
    }  # fmt: skip


def share(device: torch.device, flops: float) -> str:
    """``42% of the roofline``: of the operations of dense forward and backward passes a second."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return f"{flops / peak:.0%} of the roofline" if peak else "roofline unknown"


def throughput(device: torch.device, name: str, case: Case, way: Way, steps: int) -> tuple[float, float]:
    """Images per second of views and training together, and MiB of memory at the peak."""
    torch.manual_seed(0)
    compiled = way.compile and device.type == "cuda"
    pixels = torch.randint(0, 256, (4 * case.batch, 3, case.size, case.size), dtype=torch.uint8, device=device)
    make = DeviceViews([View(size=case.size, count=VIEWS[name], **COLOUR)], compile=compiled)
    module: nn.Module = (Lightly if way.lightly else ours)(name, case).to(device).train()
    if isinstance(module, Method):
        apply_performance_options(module, switches(way, compiled), device)
    graphs = GraphSteps() if way.graphs and compiled else None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=(way.fused and compiled) or None)
    generator = torch.Generator(device).manual_seed(0)

    def step(number: int) -> None:
        chosen = torch.randint(0, len(pixels), (case.batch,), device=device, generator=generator)
        views, boxes = make(pixels[chosen], generator)
        if way.channels_last:
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        batch: Any = Batch(views, chosen, None, boxes)
        if graphs is not None:
            graphs.on_train_batch_start(None, module, batch, number)  # type: ignore[arg-type]
        module.begin_step(number)
        with torch.autocast(device.type, torch.bfloat16, enabled=way.precision == torch.bfloat16):
            loss = module.training_step(batch, number)["loss"]
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        module.end_step()
        if graphs is not None:
            graphs.on_train_batch_end(None, module, None, batch, number)  # type: ignore[arg-type]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for number in range(count):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds(5 if compiled else 1)
    rate = case.batch * steps / seconds(steps)
    return rate, torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def switches(way: Way, compiled: bool) -> TrainerOptions:
    """The trainer's options that mean the same."""
    return TrainerOptions(
        channels_last=way.channels_last, compile=compiled, cuda_graphs=way.graphs and compiled, accumulate=1
    )


def ours(name: str, case: Case) -> Method:
    words = [f"method={name}", f"batch_size={case.batch}", "dataset=imagenet"]
    made: Method = build(compose("pretrain", words).method, backbone=create(case.backbone, stem=case.stem))
    return made


class Lightly(nn.Module):
    """The same method of lightly's modules, with the hooks of a `Method`."""

    def __init__(self, name: str, case: Case) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss, SwaVLoss
        from lightly.models.modules import SimCLRProjectionHead, SwaVProjectionHead, SwaVPrototypes

        self.backbone = create(case.backbone, stem=case.stem)
        width = self.backbone.num_features
        if name == "simclrv2":
            self.head, self.prototypes = SimCLRProjectionHead(width, width, 128, num_layers=3), None
            self.loss: nn.Module = NTXentLoss(temperature=0.1)
        else:
            self.head, self.prototypes = SwaVProjectionHead(width, 2048, 128), SwaVPrototypes(128, 3000)
            self.loss = SwaVLoss()

    def training_step(self, batch: Batch, number: int) -> dict[str, Tensor]:
        z = self.head(self.backbone(torch.cat(batch.views)))
        if self.prototypes is None:
            return {"loss": self.loss(*z.chunk(2))}
        self.prototypes.normalize()
        scores = self.prototypes(nn.functional.normalize(z, dim=1))
        return {"loss": self.loss(list(scores.chunk(2)), [])}

    def begin_step(self, number: int) -> None:
        """Nothing to set."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing moves."""

    def end_step(self) -> None:
        """Nothing follows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    small = device.type != "cuda"
    for row in run(device, SMALL if small else CASES, 1 if small else 20):
        pair = f"{row['ours']:10.4g} {row['peer']:10.4g} {row['unit']}"
        print(f"{row['name']:<42} {pair} {row['ratio']:6.2f} x   {row['check']}")


if __name__ == "__main__":
    main()
