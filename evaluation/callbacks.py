"""Evaluation while training: the same evaluators as offline, every few epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.evaluation.base import FeatureEvaluator, needs_labels, protocol, takes_targets
from selfsight.evaluation.features import FINAL, Features, extract, frozen
from selfsight.evaluation.probes.classification import online_figures
from selfsight.evaluation.probes.diagnostics import Diagnostics, judge, view_figures
from selfsight.evaluation.rows import blocks, total
from selfsight.nn.distributed import PatientBarrier
from selfsight.validation import takes, whole

VIEWED = 512  # images whose two views are compared
UNMOVED = (
    "The average network, which is what is measured, has not moved since the training began: its momentum is 1, or the "
    "learning rate is 0."
)

Result = dict[str, Any]


@takes(every=whole(1), limit=whole(1))
class OnlineEvaluation(Callback):
    """Runs evaluators on the backbone at the end of every ``every``-th epoch, and of the last one.

    Features come from ``datamodule.eval_dataloader("train" | "test", limit)``: un-augmented, backbone in eval mode.
    Alignment, uniformity and the kNN of views come from the last training views of the epoch, where the method has
    two of one size. A method's own `classifiers` are measured on the test images. Evaluators that need labels are left
    out on images without, and on a set without test images, where the label-free figures are of the training images.

    Attributes:
        results: one dict an evaluation: ``epoch`` (1-based, finished), ``step``, every figure by name, and
            ``warning`` (one sentence) when `judge` has one.
        on_result: callables that get each result as it comes (console, tables, charts).

    The numbers also land in ``trainer.callback_metrics``, where checkpoints and early stopping may look.
    """

    def __init__(
        self,
        evaluators: Mapping[str, FeatureEvaluator],
        every: int = 1,
        part: str | None = None,
        limit: int | None = 50_000,
    ) -> None:
        """
        Args:
            evaluators: by name. `Diagnostics` always runs.
            part: which part of the method is measured, by attribute name; None: the network that it carries away
                (``measured``), or its ``backbone``.
            limit: most images of a split to look at, spread evenly; None is all. Numbers of a part of a large set guide
                a run, and are not its result.
        """
        self.evaluators: dict[str, FeatureEvaluator] = {"diagnostics": Diagnostics(), **evaluators}
        self.every, self.part, self.limit = every, part, limit
        self.results: list[Result] = []
        self.on_result: list[Callable[[Result], None]] = []
        self._views: list[tuple[Tensor, Tensor]] = []
        self._barrier = PatientBarrier()
        self._began_as: float | None = None  # the average that is measured, in a number

    @property
    def protocol(self) -> dict[str, str]:
        """The protocol of each evaluator, by name."""
        part = "" if self.limit is None else f"; at most {self.limit} images of each split, spread evenly"
        return {name: f"{protocol(evaluator)}{part}" for name, evaluator in self.evaluators.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._barrier.begin()
        usual = _usual(pl_module)
        self._began_as = None if usual is pl_module.get_submodule("backbone") else _in_a_number(usual)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due(trainer):
            self._keep_views(trainer, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._due(trainer):
            return
        if trainer.is_global_zero:
            with isolate_rng():  # loaders draw seeds, and what is learnt must not depend on how often it is measured
                self._evaluate(trainer, pl_module)
        self._views.clear()
        self._barrier.wait()

    def _due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        return epoch % self.every == 0 or epoch == trainer.max_epochs

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        usual = _usual(pl_module)
        backbone = usual if self.part is None else pl_module.get_submodule(self.part)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        held_out = datamodule.data.test is not None
        splits = ("train", "test") if held_out else ("train",)
        loaders = [datamodule.eval_dataloader(split, self.limit) for split in splits]
        with trainer.precision_plugin.forward_context():  # that of the training, in which the network is compiled, too
            pair = [extract(backbone, loader, pl_module.device)[FINAL] for loader in loaders]
        train, test = pair[0], pair[-1]
        result: Result = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        _refuse_diverged(train, result)
        for evaluator in self.evaluators.values():
            if not needs_labels(evaluator) or (held_out and _comparable(evaluator, train, test)):
                result |= evaluator(train, test)
        for name, network in getattr(pl_module, "classifiers", dict)().items():
            if held_out and (test.labels is not None or test.targets is not None):
                found = online_figures(network, datamodule.eval_dataloader("test", self.limit), pl_module.device)
                result |= {f"{name}_{key}": value for key, value in found.items()}
        result |= self._view_figures(backbone)
        warning = judge({name: value for name, value in result.items() if isinstance(value, float)})
        if self._began_as is not None and self._began_as == _in_a_number(usual):
            warning = UNMOVED
        if warning:
            result["warning"] = warning
        self.results.append(result)
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in result.items() if isinstance(value, float)}
        )
        for listener in self.on_result:
            listener(result)

    def _keep_views(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Copies of two views of the epoch's last images; copies, since a batch's memory may be used again."""
        views = getattr(batch, "unlabelled", batch).views
        if len(views) < 2 or views[0].shape != views[1].shape:
            return
        left = trainer.num_training_batches - batch_idx  # inf where the loader has no length
        have = sum(len(first) for first, _ in self._views)
        if have < VIEWED and (left <= math.ceil(VIEWED / len(views[0])) or trainer.is_last_batch):
            self._views.append((views[0][: VIEWED - have].clone(), views[1][: VIEWED - have].clone()))

    def _view_figures(self, backbone: nn.Module) -> dict[str, float]:
        if not self._views:
            return {}
        with frozen(backbone):
            pairs = [(backbone(first).float(), backbone(second).float()) for first, second in self._views]
        return view_figures(*(torch.cat(side).cpu() for side in zip(*pairs, strict=True)))


def _usual(method: LightningModule) -> nn.Module:
    """The network that is measured unless another one is named."""
    return getattr(method, "measured", None) or method.get_submodule("backbone")


def _in_a_number(network: nn.Module) -> float:
    """One number that changes when any of its parameters does."""
    sums = (parameter.detach().double().square().sum().cpu() for parameter in network.parameters())
    return float(sum(sums, torch.zeros((), dtype=torch.float64)))


def _refuse_diverged(features: Features, result: Result) -> None:
    """
    Raises:
        UserError: the network's features are no numbers any more, though the loss was one.
    """
    bad = total((~torch.isfinite(part)).any(dim=1).sum() for part in blocks(features.x))
    if bad:
        raise UserError(
            f"after epoch {result['epoch']} (step {result['step']}) the features of {int(bad)} of {len(features)} "
            "images are no numbers, since the weights have diverged: lower optimizer.lr or give "
            "schedule.lr.warmup_epochs more epochs."
        )


def _comparable(evaluator: FeatureEvaluator, train: Features, test: Features) -> bool:
    """Whether both sides have what an evaluator compares: classes, or targets where it takes those."""
    if train.targets is not None and test.targets is not None:
        return takes_targets(evaluator)
    return train.labels is not None and test.labels is not None
