"""Multistage contrastive learning: each stage learns among the images that all stages before it find alike.

A contrastive network tells images apart by whatever does it first, and stops there. So its features are clustered, and
the next network is trained with batches from within one cluster each, where these differences are gone; the one after
it within what both of them find alike. The features of all stages side by side are the result.

    Zhang, Lei, Gao, Ma, Zhang, Yu: Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning.
    ECCV 2024, arXiv:2402.11816. Code: MajorDavidZhang/MCL.

Follows the paper in crossing the clusters of all stages; the released program crosses those of the last with itself.
Clusters are found by spherical k-means on all features, where the authors use mini-batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfsight.backbones.stages import Stages as SideBySide
from selfsight.checkpoints.export import export_backbone
from selfsight.checkpoints.load import load
from selfsight.datamodules import DataModule, ImageDataModule
from selfsight.datamodules.loading.clusters import ClusterOrder, pseudo_labels
from selfsight.engine import measure
from selfsight.errors import UserError
from selfsight.evaluation.probes.clustering import kmeans
from selfsight.files import write_text
from selfsight.methods.base import Method
from selfsight.validation import Kind, takes, whole

RUN = Kind("a run folder", lambda value: isinstance(value, str) and value != "", empty=True)
#: share of the images that an epoch leaves out, from which on the head of a run says what to change
MUCH = 0.3


@takes(clusters=whole(2), stages=whole(1), runs=RUN, iterations=whole(1), restarts=whole(1), seed=whole(0))
@dataclass(frozen=True)
class Stages:
    """How many stages there are, and by what the images of a batch are alike.

    Attributes:
        clusters: K, of the features of each stage; after s stages there are ``K^s``. A cluster with fewer images than a
            batch is left out, so that many of them need small batches.
        stages: networks in all, the first of which learns from any batches.
        runs: folders of the stages that are finished, the first one first.
        iterations, restarts, seed: of k-means.
    """

    clusters: int = 10
    stages: int = 3
    runs: Sequence[str] = ()
    iterations: int = 100
    restarts: int = 3
    seed: int = 0

    @property
    def leads(self) -> bool:
        """Whether further stages follow from a run of these."""
        return not self.runs and self.stages > 1

    def arrange(self, method: Method, data: DataModule, device: torch.device) -> None:
        """Let batches hold images that all of `runs` put into one cluster; the head of the run says how many are lost.

        Raises:
            UserError: the method compares no images or learns from labelled ones beside others, a run has no backbone,
                or no cluster fills a batch.
        """
        if not isinstance(data, ImageDataModule):
            raise UserError(
                f"batches=clusters is for methods that learn from images without labels, and {type(method).__name__} "
                "learns from few labels as well; leave it out."
            )
        if not method.across_images:
            raise UserError(
                f"batches=clusters makes images harder to tell apart, and {type(method).__name__} compares no images; "
                "leave it out, or choose a contrastive method such as simclrv2 or mocov3."
            )
        if not self.runs:
            return
        found = torch.stack([self.of_run(Path(run), data, device) for run in self.runs])  # [S, N]
        data.within(pseudo_labels(found, self.clusters))
        order = data.order
        assert isinstance(order, ClusterOrder)
        used = int((torch.bincount(order.labels) >= order.batch_size).sum())
        told = f"stage {len(self.runs)}: batches from within {used} clusters that earlier stages find alike"
        if order.lost > 0:
            told += f", {order.lost:.0%} of the images are left out of each epoch, since clusters hold no whole batches"
        if order.lost > MUCH:
            told += ": take a smaller batch_size or batches.clusters"
        method.tell(told)

    def of_run(self, run: Path, data: ImageDataModule, device: torch.device) -> Tensor:
        """``[N]`` int64, the cluster of each image by the features of a run, which keeps it in a file from then on."""
        images = len(data.images)
        file = run / f"clusters-{self.clusters}-{self.seed}.json"
        if file.is_file() and len(known := json.loads(file.read_text())) == images:
            return torch.tensor(known)
        if self.clusters > images:
            raise UserError(f"batches.clusters is {self.clusters}, and there are {images} images; take fewer.")
        features, _ = measure.learnt_from(load(run).to(device), data)
        x = features.in_memory().x
        own, _ = kmeans(x, x[:1], self.clusters, self.iterations, self.restarts, self.seed)
        clusters = torch.zeros(images, dtype=torch.int64)  # of images that cannot be read, any
        clusters[features.indices.cpu()] = torch.from_numpy(own).long()
        write_text(file, json.dumps(clusters.tolist()) + "\n")
        return clusters


def export_together(runs: Sequence[Path], place: Path) -> Path:
    """The backbones of all stages as one that gives their features side by side, exported into the folder ``place``."""
    networks = [load(run) for run in runs]
    spec = dict(networks[0].spec)
    arguments = [{**network.spec["backbone"], "pretrained": False} for network in networks]
    spec["backbone"] = {"_target_": f"{SideBySide.__module__}.{SideBySide.__name__}", "networks": arguments}
    place.mkdir(exist_ok=True)
    export_backbone(SideBySide(networks), spec, place)
    return place
