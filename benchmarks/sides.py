"""The trainings that `end_to_end` puts side by side, each in a process of its own; ours is the command and not here.

    python benchmarks/sides.py lightly | loop | official '{"method": ..., "root": ..., ...}'     # a `Task` as JSON

``lightly`` has its modules, losses and transforms under a Lightning trainer, as the examples of its documentation do:
every view passes the network by itself. ``loop`` is SimCLR in plain PyTorch over torchvision's transforms; ``official``
is SparK in the way of its authors' code, as `spark.Peer` has it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from watch import Watch

from selfsight.backbones.registry import create

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: SwAV's small crops beside its large ones (96 beside 224)
LOCAL = 0.4286
READY = 5  #: steps of the loop on a batch that is there


@dataclass(frozen=True)
class Task:
    """What a side is to do.

    Attributes:
        root: folder with ``train`` in class folders. size: of the views.
        steps: optimiser steps; None: until ``seconds`` have passed since the process was started.
        file: where the figures go, as JSON. weights: where the backbone's go; None: nowhere.
        workers: processes that read.
    """

    method: str
    backbone: str
    stem: str
    size: int
    batch: int
    root: str
    file: str
    workers: int
    steps: int | None = None
    seconds: float | None = None
    weights: str | None = None


class Clock(Callback):
    """Watches any Lightning training, ours too, and stops it when ``seconds`` have passed."""

    def __init__(self, file: str, batch: int, seconds: float | None = None, weights: str | None = None) -> None:
        self.file, self.batch, self.seconds, self.weights = file, batch, seconds, weights
        self.watch = Watch()

    def on_train_batch_start(self, *args: object) -> None:
        self.watch.begin()

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.watch.end()
        if self.seconds is not None and self.watch.seconds > self.seconds:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.watch.write(self.file, self.batch)
        keep(module.backbone, self.weights)


def keep(backbone: Any, file: str | None) -> None:
    if file is not None:
        torch.save({name: value.float() for name, value in backbone.state_dict().items()}, file)


# --- lightly under a Lightning trainer ------------------------------------------------------------------------------


class Contrast(LightningModule):
    """SimCLR of lightly's modules."""

    def __init__(self, backbone: Any) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        self.backbone = backbone
        self.head = SimCLRProjectionHead(backbone.num_features, backbone.num_features, 128)
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, number: int) -> Tensor:
        first, second = batch[0]
        loss: Tensor = self.criterion(self.head(self.backbone(first)), self.head(self.backbone(second)))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class Clusters(LightningModule):
    """SwAV of lightly's modules, with two large crops and six small ones."""

    def __init__(self, backbone: Any) -> None:
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__()
        self.backbone = backbone
        self.head = SwaVProjectionHead(backbone.num_features, 512, 128)
        self.prototypes = SwaVPrototypes(128, n_prototypes=512)
        self.criterion = SwaVLoss()

    def scores(self, view: Tensor) -> Tensor:
        found: Tensor = self.prototypes(F.normalize(self.head(self.backbone(view)), dim=1))
        return found

    def training_step(self, batch: Any, number: int) -> Tensor:
        self.prototypes.normalize()
        scores = [self.scores(view) for view in batch[0]]
        loss: Tensor = self.criterion(scores[:2], scores[2:])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


def lightly(task: Task) -> None:
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform, SwaVTransform

    backbone = create(task.backbone, stem=task.stem)
    if task.method == "simclrv2":
        module: LightningModule = Contrast(backbone)
        colour = {"cj_strength": 0.5, "gaussian_blur": 0.0} if task.size <= 32 else {}
        transform: Any = SimCLRTransform(input_size=task.size, **colour)
    else:
        module, transform = Clusters(backbone), SwaVTransform(crop_sizes=(task.size, round(LOCAL * task.size)))
    loader = batches(LightlyDataset(f"{task.root}/train", transform=transform), task)
    clock = Clock(task.file, task.batch, task.seconds, task.weights)
    ends: dict[str, Any] = {"max_steps": task.steps} if task.steps else {"max_epochs": 1_000_000}
    trainer = Trainer(
        **ends, accelerator="cpu", devices=1, callbacks=[clock], default_root_dir=str(Path(task.file).parent)
    )
    trainer.fit(module, loader)


def batches(images: Dataset, task: Task) -> DataLoader:
    return DataLoader(images, task.batch, shuffle=True, drop_last=True, num_workers=task.workers)


# --- plain PyTorch ---------------------------------------------------------------------------------------------------


class Views:
    """``count`` views of an image by one of torchvision's transforms."""

    def __init__(self, transform: Callable[[Any], Tensor], count: int) -> None:
        self.transform, self.count = transform, count

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.transform(image) for _ in range(self.count)]


def loop(task: Task) -> None:
    """SimCLR without a trainer; then some steps on the last batch, which nothing has to be done for."""
    from torchvision import transforms as tv
    from torchvision.datasets import ImageFolder

    transform = tv.Compose(
        [
            tv.RandomResizedCrop(task.size, scale=(0.08, 1.0)), tv.RandomHorizontalFlip(),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), tv.RandomGrayscale(0.2),
            tv.ToTensor(), tv.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    backbone: Any = create(task.backbone, stem=task.stem)
    width = backbone.num_features
    head = nn.Sequential(
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 128, bias=False), nn.BatchNorm1d(128),
    )  # fmt: skip
    network = nn.Sequential(backbone, head)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06)

    def step(views: list[Tensor]) -> None:
        loss = contrast(network(torch.cat(views)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    watch, ready = Watch(), Watch()
    views = run(again(batches(ImageFolder(f"{task.root}/train", Views(transform, 2)), task)), step, task, watch)
    for _ in range(READY):
        ready.begin()
        step(views)
        ready.end()
    at_hand = ready.figures(task.batch)
    watch.write(task.file, task.batch, ready_images_s=at_hand["images_s"], ready_cpu_image=at_hand["cpu_image"])
    keep(backbone, task.weights)


def contrast(z: Tensor) -> Tensor:
    """SimCLR's loss of projections ``[2 B, D]``, the second views after the first ones."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def again(loader: Iterable[Any]) -> Iterator[list[Tensor]]:
    """The views of one epoch after the other."""
    while True:
        for views, _ in loader:
            yield views


def run(views: Iterator[list[Tensor]], step: Callable[[list[Tensor]], None], task: Task, watch: Watch) -> Any:
    """Steps as ``task`` has them; gives back the last views."""
    drawn: Any = None
    for drawn in islice(views, task.steps):
        watch.begin()
        step(drawn)
        watch.end()
        if task.seconds is not None and watch.seconds > task.seconds:
            break
    return drawn


# --- SparK as its authors have it -------------------------------------------------------------------------------------


def official(task: Task) -> None:
    import spark
    from torchvision import transforms as tv
    from torchvision.datasets import ImageFolder

    from selfsight.losses.spark import masked_patch_loss

    transform = tv.Compose(
        [
            tv.RandomResizedCrop(task.size, scale=(0.67, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    backbone = create(task.backbone, stem=task.stem)
    parts = spark.spark(create(task.backbone, stem=task.stem), 0.6, 768, "dense")
    peer = spark.Peer(backbone, parts).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=2e-4)

    def step(views: list[Tensor]) -> None:
        x = views[0]
        active = parts.draw_mask(x).active
        loss = masked_patch_loss(peer.decode(peer.encode(x, active)), x, active)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    watch = Watch()
    run(again(batches(ImageFolder(f"{task.root}/train", Views(transform, 1)), task)), step, task, watch)
    watch.write(task.file, task.batch)
    keep(backbone, task.weights)


SIDES: dict[str, Callable[[Task], None]] = {"lightly": lightly, "loop": loop, "official": official}

if __name__ == "__main__":
    if "BENCHMARK_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    torch.manual_seed(0)
    random.seed(0)
    SIDES[sys.argv[1]](Task(**json.loads(sys.argv[2])))
