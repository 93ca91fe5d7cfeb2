"""What the trainer adds to a training step: SimCLR under the Trainer against the same in a plain loop."""

from __future__ import annotations

import functools
import itertools
import logging
import statistics
import time
import warnings

import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from turns import Comparison

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

STEPS = 200
GOAL_STEP = 20.0  # ms; what is added to a step is stated as a share of one of this length


def simclr(width: int, stem: str, steps: int, batch: int, name: str = "resnet18") -> SimCLRv2:
    method = SimCLRv2(
        create(name, stem=stem), temperature=0.5, projection_dim=width, projection_layers=2, reduction="sum_of_means",
        chunk_size=None, memory=0, memory_momentum=0.999, online_classes=0, classifier_decay=0.0,
    )  # fmt: skip
    recipe = OptimizationRecipe(functools.partial(torch.optim.SGD, momentum=0.9), lr=0.01)
    method.configure(recipe, Clock(examples=batch * steps, batch_size=batch, epochs=1, steps_per_epoch=steps))
    return method


def plain_loop(method: SimCLRv2, batches: list[Batch]) -> torch.Tensor:
    """The way a method trains without any trainer; the loss of the last step."""
    optimizer = method.configure_optimizers()
    for step, batch in enumerate(batches):
        method.begin_step(step)
        loss = method.training_step(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
    return loss.detach()


def run(rounds: int) -> Comparison:
    """Medians over the steps, from the start of one to that of the next: setting up a trainer counts for neither.

    The network is small: with 44 MB of gradients to allocate anew in each step, as in a ResNet-18, the spread of the
    allocator's time is larger than what a trainer adds.
    """
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    batches = [Batch([torch.randn(4, 3, 16, 16) for _ in range(2)], torch.arange(4)) for _ in range(STEPS)]
    start = simclr(64, "cifar", STEPS, 4, "resnet10_slim").state_dict()
    losses: dict[str, torch.Tensor] = {}
    cpu: dict[str, list[float]] = {"ours": [], "peer": []}
    wall: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(rounds + 1):
        for side in ("peer", "ours"):
            method = simclr(64, "cifar", STEPS, 4, "resnet10_slim").train()
            method.load_state_dict(start)
            times = timed(method)
            if side == "peer":
                plain_loop(method, batches)
            else:
                trainer = Trainer(
                    max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False,
                )  # fmt: skip
                trainer.fit(method, DataLoader(batches, batch_size=None))
            losses[side] = plain_loss(method, batches)
            if turn:
                used, passed = zip(*times, strict=True)
                cpu[side] += [b - a for a, b in itertools.pairwise(used)]
                wall[side] += [b - a for a, b in itertools.pairwise(passed)]
    assert torch.allclose(losses["ours"], losses["peer"]), f"the two loops end elsewhere: {losses}"
    ours, peer = (1e3 * statistics.median(cpu[side]) for side in ("ours", "peer"))
    waited = 1e3 * (statistics.median(wall["ours"]) - statistics.median(wall["peer"]))
    added = ours - peer
    return Comparison(
        "step_overhead", GOAL_STEP + added, GOAL_STEP, unit="ms/step", target=0.97, spread=0.0, memory=(0.0, 0.0),
        wall=GOAL_STEP / (GOAL_STEP + waited),
        check=f"the same loss after the last step; {added:.2f} ms more than {peer:.2f}, {added / GOAL_STEP:.1%} of "
        f"{GOAL_STEP:.0f} ms; SimCLR, ResNet-10 of width 16, 2 x 4 images of 16 pixels",
    )  # fmt: skip


def timed(method: SimCLRv2) -> list[tuple[float, float]]:
    """CPU and wall time at the beginning of every step, as they come."""
    times: list[tuple[float, float]] = []
    begin = method.begin_step

    def begin_step(step: int) -> None:
        times.append((time.process_time(), time.perf_counter()))
        begin(step)

    method.begin_step = begin_step  # type: ignore[method-assign]
    return times


@torch.no_grad()
def plain_loss(method: SimCLRv2, batches: list[Batch]) -> torch.Tensor:
    method.eval()
    return method.training_step(batches[0], 0)["loss"]
