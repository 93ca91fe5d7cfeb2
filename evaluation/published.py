"""The linear evaluations the methods' authors published, by name: frozen backbone, augmented images, SGD or LARS.

Their numbers compare with the papers'. The probes on cached features (`linear`) are faster and a few tenths away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError, nearest
from selfsight.evaluation.features import FINAL, Device, frozen, home, missing_labels, staged
from selfsight.evaluation.probes.linear import top_accuracies
from selfsight.nn.probes import ConvClassifier, LinearClassifier, MultLayerClassifier, NormalisedLinear
from selfsight.optim.groups import split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.schedule import Clock, Cosine, Milestones, Schedule, Table, Warmup
from selfsight.validation import above, takes, whole

CROP = {"crop": "resized", "scale": (0.08, 1.0), "hflip": 0.5}


@dataclass(frozen=True)
class Protocol:
    """One published linear evaluation.

    Attributes:
        source: where its values stand. lr: peak rate at ``batch_size``; other batches scale it linearly if ``scaled``.
        schedule: multiples of the peak rate. weight_decay: on weight and bias.
        weight_std: of the linear classifier's first weights, 0 for zeros, None for PyTorch's default; biases start at 0
            with a given std.
        lars: LARS without decay in place of SGD; biases take steps of SGD.
        head: what is trained: ``linear`` on the pooled stage, ``normalised-linear`` with a BatchNorm without scale and
            shift before it, or RotNet's classifiers on its map: ``map-linear``, ``map-conv``, ``map-mlp``.
        views: what training sees, as arguments of a `View`; evaluation sees the plain view of the data set.
        differs: what is done otherwise here, and why.
        stages: what the authors put the classifier on, where that depends on the network.
    """

    source: str
    batch_size: int
    epochs: int
    lr: float
    schedule: Schedule
    scaled: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    lars: bool = False
    weight_decay: float = 0.0
    weight_std: float | None = None
    head: str = "linear"
    views: Mapping[str, Any] = field(default_factory=lambda: CROP)
    differs: str = ""
    stages: str = ""


SIMCLR_CROP = {"crop": "resized_simclr", "interpolation": "bicubic_simclr", "hflip": 0.5}
ROTNET_CROP = {"crop": "resized", "scale": (0.57, 0.77), "ratio": (1.0, 1.0), "hflip": 0.5}
PADDED_CROP = {"crop": "padded", "padding": 4, "hflip": 0.5}

PROTOCOLS: Mapping[str, Protocol] = {
    "simclr": Protocol(
        "google-research/simclr README, ImageNet linear evaluation",
        batch_size=4096, epochs=90, lr=1.6, schedule=Cosine(1.0, 0.0), nesterov=True, weight_decay=1e-6, weight_std=0.0,
        views=SIMCLR_CROP,
    ),
    "simclr-cifar10": Protocol(
        "google-research/simclr README, CIFAR-10 linear evaluation",
        batch_size=512, epochs=100, lr=0.2, schedule=Cosine(1.0, 0.0), nesterov=True, weight_std=0.0, views=SIMCLR_CROP,
    ),
    "swav": Protocol(
        "facebookresearch/swav eval_linear.py",
        batch_size=256, epochs=100, lr=0.3, schedule=Cosine(1.0, 0.0, per="epoch"), scaled=False, weight_decay=1e-6,
        weight_std=0.01, differs="the last epoch is reported, the authors' script the best on the test set",
    ),
    "supcon": Protocol(
        "HobbitLong/SupContrast main_linear.py and README, CIFAR",
        batch_size=512, epochs=100, lr=5.0, schedule=Milestones(1.0, 0.2, (60, 75, 90)), scaled=False,
        views=CROP | {"scale": (0.2, 1.0)},
        differs="the last epoch is reported, the authors' script the best on the test set; no short last batch",
    ),
    "supcon-simclr": Protocol(
        "HobbitLong/SupContrast README, CIFAR, linear stage on its SimCLR",
        batch_size=512, epochs=100, lr=1.0, schedule=Milestones(1.0, 0.2, (60, 75, 90)), scaled=False,
        views=CROP | {"scale": (0.2, 1.0)},
        differs="the last epoch is reported, the authors' script the best on the test set; no short last batch",
    ),
    "pixpro": Protocol(
        "zdaxie/PixPro main_linear.py, its defaults",
        batch_size=256, epochs=100, lr=30.0, schedule=Warmup(5, 0.0, Cosine(1.0, 0.0)), scaled=False,
        differs="BatchNorm stays frozen, which the authors' script lets drift; all test images count",
    ),
    "mae": Protocol(
        "facebookresearch/mae main_linprobe.py and README, ViT-B",
        batch_size=16384, epochs=90, lr=6.4, schedule=Warmup(10, 0.0, Cosine(1.0, 0.0)), lars=True,
        head="normalised-linear", views=CROP | {"interpolation": "bicubic"},
        differs="crops are torchvision's, the authors' draw once and clip",
    ),
    "mocov3": Protocol(
        "facebookresearch/moco-v3 main_lincls.py, ResNet-50",
        batch_size=1024, epochs=90, lr=0.4, schedule=Cosine(1.0, 0.0, per="epoch"), weight_std=0.01,
        differs="the last epoch is reported, the authors' script the best on the test set",
    ),
    "mocov3-vit": Protocol(
        "facebookresearch/moco-v3 main_lincls.py and README, ViT",
        batch_size=1024, epochs=90, lr=12.0, schedule=Cosine(1.0, 0.0, per="epoch"), weight_std=0.01,
        differs="the last epoch is reported, the authors' script the best on the test set",
    ),
    "dino": Protocol(
        "facebookresearch/dino eval_linear.py, its defaults",
        batch_size=1024, epochs=100, lr=0.004, schedule=Cosine(1.0, 0.0, per="epoch"), weight_std=0.01,
        differs="the last epoch is reported, the authors' script the best on the test set",
        stages="token4 of ViT-S, token-avg of ViT-B, final of ResNet-50",
    ),
    "rotation": Protocol(
        "gidariss/FeatureLearningRotNet, ImageNet linear classifiers on one layer's map",
        batch_size=192, epochs=35, lr=0.01, schedule=Table([(5, 1.0), (15, 0.2), (25, 0.04), (35, 0.008)]),
        scaled=False, nesterov=True, weight_decay=5e-4, head="map-linear", views=ROTNET_CROP,
        differs="square crops of 57 to 77 % of the image stand for places of 224 pixels in one of 256",
    ),
    "rotation-conv": Protocol(
        "gidariss/FeatureLearningRotNet, CIFAR-10 convolutional classifier on one block's map",
        batch_size=128, epochs=100, lr=0.1, schedule=Table([(35, 1.0), (70, 0.2), (85, 0.04), (100, 0.008)]),
        scaled=False, nesterov=True, weight_decay=5e-4, head="map-conv", views=PADDED_CROP,
        differs="the last epoch is reported, the authors' script the best on the test set",
    ),
    "rotation-mlp": Protocol(
        "gidariss/FeatureLearningRotNet, CIFAR-10 three-layer classifier on one block's map",
        batch_size=128, epochs=100, lr=0.1, schedule=Table([(20, 1.0), (40, 0.2), (45, 0.04), (100, 0.008)]),
        scaled=False, nesterov=True, weight_decay=5e-4, head="map-mlp", views=PADDED_CROP,
        differs="the last epoch is reported, the authors' script the best on the test set",
    ),
}  # fmt: skip


@takes(epochs=whole(1), batch_size=whole(1), lr=above(0), first_per_class=whole(1), seed=whole(0))
@dataclass(frozen=True)
class PublishedProbe:
    """Trains classifiers on frozen features of augmented images, one a stage, all on the same forward pass.

    Attributes:
        protocol_name: one of `PROTOCOLS`. stages: see `features.staged`; each has a classifier of its own.
        epochs, batch_size, lr: other than published, for data sets of another size; the protocol line then says so.
        first_per_class: labels of the first images of every class alone, in the order of the data set; an epoch stays
            as long as with all of them (RotNet's few-label protocol). None: all.
        head: the projector, for the stage ``projection``.
    """

    protocol_name: str
    stages: Sequence[str] = (FINAL,)
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    first_per_class: int | None = None
    seed: int = 0
    head: nn.Module | None = None
    needs_labels = True

    def __post_init__(self) -> None:
        if self.protocol_name == "spark-finetune":
            raise UserError(
                "SparK publishes no linear protocol, its authors train the whole network: use `selfsight finetune`."
            )
        if self.protocol_name not in PROTOCOLS:
            hint = nearest(self.protocol_name, PROTOCOLS)
            raise UserError(f"'{self.protocol_name}' is no published protocol ({', '.join(PROTOCOLS)}).{hint}")

    @property
    def rule(self) -> Protocol:
        """The protocol with the changes asked for."""
        rule = PROTOCOLS[self.protocol_name]
        batch = self.batch_size or rule.batch_size
        scaled = rule.lr * batch / rule.batch_size if rule.scaled else rule.lr
        return replace(rule, batch_size=batch, epochs=self.epochs or rule.epochs, lr=self.lr or scaled)

    @property
    def protocol(self) -> str:
        rule, published = self.rule, PROTOCOLS[self.protocol_name]
        changed = [
            f"{name} {getattr(rule, name):g} for {getattr(published, name):g}"
            for name in ("epochs", "batch_size", "lr")
            if getattr(rule, name) != getattr(published, name)
        ]
        few = (
            [] if self.first_per_class is None else [f"labels of the first {self.first_per_class} of every class alone"]
        )
        stages = [f"stage {', '.join(self.stages)}, the authors' {published.stages}"] if published.stages else []
        notes = [published.source, *stages, *few, *changed, *([published.differs] if published.differs else [])]
        optimiser = "LARS" if rule.lars else "SGD"
        return f"linear probe '{self.protocol_name}', augmented images, {optimiser}, last epoch ({'; '.join(notes)})"

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, float]:
        """``linear_top1`` (``linear_top5``) of the last stage asked for, and ``linear_<stage>_top1`` of every one.

        Raises:
            UserError: training or test images have no labels, before anything is trained.
        """
        if reason := missing_labels(datamodule.data):
            raise UserError(f"A linear probe needs labels to learn and to measure, and {reason}.")
        device = home(backbone, device)
        heads = self.train(backbone, datamodule, device)
        logits: dict[str, list[Tensor]] = {stage: [] for stage in self.stages}
        labels: list[Tensor] = []
        with frozen(heads), self._inputs(backbone) as inputs:
            for batch in datamodule.eval_dataloader("test"):
                for stage, x in inputs(batch.views[0].to(device)).items():
                    logits[stage].append(heads[_key(stage)](x).cpu())
                labels.append(batch.labels.cpu())
        truth = torch.cat(labels)
        known = truth >= 0
        results: dict[str, float] = {}
        for stage in self.stages:
            scores = top_accuracies(torch.cat(logits[stage])[known], truth[known])
            results |= {f"linear_{stage}_{name}": value for name, value in scores.items()}
            results |= {f"linear_{name}": value for name, value in scores.items()}
        return results

    def train(self, backbone: nn.Module, datamodule: Any, device: torch.device) -> nn.ModuleDict:
        """The classifiers, by stage."""
        rule = self.rule
        module = self._datamodule(datamodule, rule, device)
        classes = len(datamodule.data.classes)
        if classes < 2:
            raise UserError(f"A linear probe tells classes apart, and data set '{datamodule.data.name}' has {classes}.")
        clock = Clock(module.examples, rule.batch_size, rule.epochs, module.steps_per_epoch)
        heads, optimizer = nn.ModuleDict(), None
        step = 0
        with self._inputs(backbone) as inputs:
            for _ in range(rule.epochs):
                for batch in module.train_dataloader():
                    x, labels = inputs(batch.views[0].to(device)), batch.labels.to(device)
                    if optimizer is None:
                        heads.update({_key(s): classifier(x[s], classes, rule, self.seed) for s in self.stages})
                        heads.to(device)
                        optimizer = optimizer_of(heads, rule)
                    for group in optimizer.param_groups:
                        group["lr"] = rule.lr * rule.schedule(step, clock)
                    with torch.enable_grad():
                        losses = [F.cross_entropy(heads[_key(stage)](x[stage]), labels) for stage in self.stages]
                        optimizer.zero_grad()
                        torch.stack(losses).sum().backward()
                    optimizer.step()
                    step += 1
        return heads

    @contextmanager
    def _inputs(self, backbone: nn.Module) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
        """From images to what each stage's classifier sees, the backbone frozen."""
        with staged(backbone, self.stages, head=self.head, maps=self.rule.head.startswith("map-")) as outputs:
            yield lambda images: {stage: x.float() for stage, x in outputs(images).items()}

    def _datamodule(self, datamodule: Any, rule: Protocol, device: torch.device) -> Any:
        """The training images, augmented as the protocol says."""
        data, like = datamodule.data, datamodule.views[0]
        view = type(like)(data.image_size, mean=like.mean, std=like.std, **rule.views)
        if data.train.labels is None:
            raise UserError(f"A linear probe needs labels, and the training images of '{data.name}' have none.")
        labels, K = data.train.labels, self.first_per_class
        known = [(labels == c).nonzero()[:, 0] for c in range(len(data.classes))]
        fewest = min(map(len, known))
        if K is not None and fewest < K:
            raise UserError(
                f"The first {K} labels of every class were asked for, and the smallest class has {fewest} labelled "
                "training images: ask for no more than that."
            )
        labelled = data.train.select(torch.cat([rows[:K] for rows in known]).sort().values)
        examples = sum(map(len, known))
        return type(datamodule)(
            replace(data, train=labelled, unlabelled=None), [view], batch_size=min(rule.batch_size, examples),
            num_workers=datamodule.num_workers, engine="auto", seed=self.seed, device=device, examples=examples,
        )  # fmt: skip


def optimizer_of(heads: nn.Module, rule: Protocol) -> torch.optim.Optimizer:
    """What the protocol trains its classifiers by."""
    if rule.lars:
        groups = split_no_decay(heads)
        return LARS(groups, rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay, variant="torch")
    return torch.optim.SGD(
        heads.parameters(), rule.lr, rule.momentum, nesterov=rule.nesterov, weight_decay=rule.weight_decay
    )


def classifier(x: Tensor, classes: int, rule: Protocol, seed: int) -> nn.Module:
    """A head for inputs like ``x``, started as the protocol says, on its own seed."""
    channels = x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if rule.head == "map-linear":  # the authors pool AlexNet's maps to about 9000 numbers each
            return LinearClassifier(channels, classes, side=max(1, min(round(math.sqrt(9000 / channels)), x.shape[-1])))
        if rule.head == "map-conv":
            return ConvClassifier(channels, classes)
        if rule.head == "map-mlp":
            return MultLayerClassifier(channels, classes, side=x.shape[-1])
        if rule.head == "normalised-linear":
            return NormalisedLinear(channels, classes)
        layer = nn.Linear(channels, classes)
        if rule.weight_std is not None:
            nn.init.normal_(layer.weight, std=rule.weight_std)
            nn.init.zeros_(layer.bias)
    return layer


def _key(stage: str) -> str:
    """Module names have no dots."""
    return stage.replace(".", "-")
