"""The linear evaluations the methods' authors published, by name: frozen backbone, augmented images, SGD.

Their numbers compare with the papers'. The probes on cached features (`linear`) are faster and a few tenths away.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from selfsight.errors import UserError, nearest
from selfsight.optim.schedule import Clock, Cosine, Milestones, Schedule, Warmup

from .features import FINAL, Device, extract, frozen, home, pooled, tapped
from .linear import top_accuracies

log = logging.getLogger("selfsight")

CROP = {"crop": "resized", "scale": (0.08, 1.0), "hflip": 0.5}


@dataclass(frozen=True)
class Protocol:
    """One published linear evaluation.

    Attributes:
        source: where its values stand. lr: peak rate at ``batch_size``; other batches scale it linearly if ``scaled``.
        schedule: multiples of the peak rate. weight_decay: on weight and bias.
        weight_std: of the classifier's first weights, 0 for zeros, None for PyTorch's default; biases start at 0 with a
            given std.
        views: what training sees, as arguments of a `View`; evaluation sees the plain view of the data set.
        differs: what is done otherwise here, and why.
    """

    source: str
    batch_size: int
    epochs: int
    lr: float
    schedule: Schedule
    scaled: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    weight_std: float | None = None
    views: Mapping[str, Any] = field(default_factory=lambda: CROP)
    differs: str = ""


SIMCLR_CROP = {"crop": "resized_simclr", "interpolation": "bicubic_simclr", "hflip": 0.5}

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
}  # fmt: skip


@dataclass(frozen=True)
class PublishedProbe:
    """Trains classifiers on frozen features of augmented images, one a stage, all on the same forward pass.

    Attributes:
        protocol_name: one of `PROTOCOLS`. stages: as in `extract`, heads of their own each.
        epochs, batch_size, lr: other than published, for data sets of another size; the protocol line then says so.
    """

    protocol_name: str
    stages: Sequence[str] = (FINAL,)
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0

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
        notes = [published.source, *changed, *([published.differs] if published.differs else [])]
        return f"linear probe '{self.protocol_name}', augmented images, SGD, last epoch ({'; '.join(notes)})"

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, float]:
        """``linear_top1`` (``linear_top5``) of the last stage asked for, and ``linear_<stage>_top1`` of every one."""
        device = home(backbone, device)
        test = extract(backbone, datamodule.eval_dataloader("test"), device, self.stages)
        heads = self.train(backbone, datamodule, device)
        results: dict[str, float] = {}
        with frozen(heads):
            for stage in self.stages:
                features = test[stage].to(device)
                scores = top_accuracies(heads[_key(stage)](features.x), features.known_labels)
                results |= {f"linear_{stage}_{name}": value for name, value in scores.items()} | {
                    f"linear_{name}": value for name, value in scores.items()
                }
        return results

    def train(self, backbone: nn.Module, datamodule: Any, device: torch.device) -> nn.ModuleDict:
        """The classifiers, by stage."""
        rule = self.rule
        module = self._datamodule(datamodule, rule, device)
        classes = len(datamodule.data.classes)
        if classes < 2:
            raise UserError(f"A linear probe tells classes apart, and data set '{datamodule.data.name}' has {classes}.")
        clock = Clock(module.examples, rule.batch_size, rule.epochs, module.steps_per_epoch)
        heads = nn.ModuleDict()
        optimizer: torch.optim.SGD | None = None
        step = 0
        names = [stage for stage in self.stages if stage != FINAL]
        with frozen(backbone), tapped(backbone, names, pooled) as caught:
            for _ in range(rule.epochs):
                for batch in module.train_dataloader():
                    caught[FINAL] = pooled(backbone(batch.views[0].to(device)))
                    if optimizer is None:
                        for stage in self.stages:
                            heads[_key(stage)] = classifier(
                                caught[stage].shape[1], classes, rule.weight_std, self.seed
                            ).to(device)
                        optimizer = torch.optim.SGD(
                            heads.parameters(),
                            rule.lr,
                            rule.momentum,
                            nesterov=rule.nesterov,
                            weight_decay=rule.weight_decay,
                        )
                    for group in optimizer.param_groups:
                        group["lr"] = rule.lr * rule.schedule(step, clock)
                    labels = batch.labels.to(device)
                    with torch.enable_grad():
                        losses = [F.cross_entropy(heads[_key(s)](caught[s].float()), labels) for s in self.stages]
                        optimizer.zero_grad()
                        torch.stack(losses).sum().backward()
                    optimizer.step()
                    step += 1
        return heads

    def _datamodule(self, datamodule: Any, rule: Protocol, device: torch.device) -> Any:
        """The training images, augmented as the protocol says."""
        data, like = datamodule.data, datamodule.views[0]
        view = type(like)(data.image_size, mean=like.mean, std=like.std, **rule.views)
        if data.train.labels is None:
            raise UserError(f"A linear probe needs labels, and the training images of '{data.name}' have none.")
        labelled = data.train.select((data.train.labels >= 0).nonzero()[:, 0])
        return type(datamodule)(
            replace(data, train=labelled, unlabelled=None), [view], batch_size=min(rule.batch_size, len(labelled)),
            num_workers=datamodule.num_workers, engine="auto", seed=self.seed, device=device,
        )  # fmt: skip


def classifier(width: int, classes: int, weight_std: float | None, seed: int) -> nn.Linear:
    """A linear layer, started as the protocol says, on its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(width, classes)
        if weight_std is not None:
            nn.init.normal_(layer.weight, std=weight_std)
            nn.init.zeros_(layer.bias)
    return layer


def _key(stage: str) -> str:
    """Module names have no dots."""
    return stage.replace(".", "-")
