"""What the trainer adds to a training step: SimCLR under the Trainer against the same in a plain loop."""

from __future__ import annotations

import functools
import logging
import warnings

import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from turns import Comparison, compare

from selfsight.backbones.registry import create
from selfsight.batch import Batch
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

STEPS = 40


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
        method.on_after_backward()
        optimizer.step()
        method.end_step()
    return loss.detach()


def run(rounds: int) -> Comparison:
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    batches = [Batch([torch.randn(8, 3, 16, 16) for _ in range(2)], torch.arange(8)) for _ in range(STEPS)]
    start = simclr(64, "cifar", STEPS, 8).state_dict()
    losses = {}

    def fresh() -> SimCLRv2:
        method = simclr(64, "cifar", STEPS, 8)
        method.load_state_dict(start)
        return method.train()

    def ours() -> None:
        method = fresh()
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(method, DataLoader(batches, batch_size=None))
        losses["ours"] = plain_loss(method, batches)

    def peer() -> None:
        method = fresh()
        plain_loop(method, batches)
        losses["peer"] = plain_loss(method, batches)

    ours(), peer()
    assert torch.allclose(losses["ours"], losses["peer"]), f"the two loops end elsewhere: {losses}"
    return compare(
        "step_overhead", ours, peer, items=STEPS, unit="ms/step", rounds=rounds, target=0.97,
        check="the same loss after the last step; SimCLR, ResNet-18 CIFAR, 2 x 8 images of 16 pixels",
    )  # fmt: skip


@torch.no_grad()
def plain_loss(method: SimCLRv2, batches: list[Batch]) -> torch.Tensor:
    method.eval()
    return method.training_step(batches[0], 0)["loss"]
