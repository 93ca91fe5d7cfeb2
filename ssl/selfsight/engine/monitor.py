"""What is told of a training: a line an epoch, a row of metrics.csv, a warning where the numbers look wrong."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.markup import escape
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from selfsight.contracts import Batch, SemiBatch
from selfsight.engine import trackers
from selfsight.engine.checkpointing import Checkpoint
from selfsight.engine.nan_guard import NanGuard
from selfsight.evaluation import OnlineEvaluation
from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes import diagnostics
from selfsight.methods.base import Method
from selfsight.runs.console import clock_text
from selfsight.runs.folder import RunFolder

GRADIENT = "grad_norm"  #: column of the mean norm of the gradient
WAITING = "data_wait_share"  #: column of the share of an epoch's time in which the training waited for batches


class Monitor(Callback):
    """Collects the numbers of every step on the device, and tells them once an epoch.

    Stands after the guard and the online evaluation among the callbacks, whose ``results`` then end with this epoch's
    figures.
    """

    def __init__(
        self, folder: RunFolder, console: Console, evaluation: OnlineEvaluation | None, guard: NanGuard
    ) -> None:
        self.folder, self.console, self.evaluation, self.guard = folder, console, evaluation, guard
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = self.updates = 0
        self.images = 0
        self.losses: list[float] = []
        self.warned: set[str] = set()
        self.began = self.last_step = 0.0
        self.first_epoch = 0
        self.run_began: float | None = None
        self.seconds_before = self.waited_before = 0.0

    # --- what a run that goes on has to know -------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Of training so far, with the online evaluation, over all parts of a run that was stopped."""
        return self.seconds_before + (0.0 if self.run_began is None else time.perf_counter() - self.run_began)

    def state_dict(self) -> dict[str, object]:
        return {"sums": self.sums, "steps": self.steps, "updates": self.updates, "seconds": self.seconds}

    def load_state_dict(self, state_dict: Checkpoint) -> None:
        self.sums, self.steps = state_dict["sums"], state_dict["steps"]
        self.updates = state_dict.get("updates", 0)  # older runs did not measure gradients
        self.seconds_before = state_dict["seconds"]

    # --- the line --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_began = self.began = time.perf_counter()  # in the middle of an epoch its start is not told again
        self.losses = [float(row["loss"]) for row in self.folder.read_metrics() if row.get("loss")]
        self.sums = {name: value.to(pl_module.device) for name, value in self.sums.items()}
        self.first_epoch = trainer.current_epoch
        if trainer.is_global_zero:
            trackers.describe(trainer.loggers, self.folder)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums, self.steps, self.updates, self.images = {}, 0, 0, 0
        self.began, self.waited_before = time.perf_counter(), waited(trainer) or 0.0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch | SemiBatch,
        batch_idx: int,
    ) -> None:
        assert isinstance(outputs, Mapping)
        if not self.guard.wrong:  # what is left out of the weights is left out of the means
            for name, value in outputs.items():
                if torch.is_tensor(value) and value.numel() == 1:
                    self.add(name, value.detach().float().reshape(()))
            self.steps += 1
        self.last_step = time.perf_counter()
        self.images += len(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the norm of the whole gradient, before it is clipped; of a step that is taken twice the first one."""
        if isinstance(pl_module, Method) and pl_module.goes_again:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.add(GRADIENT, get_total_norm(gradients).float())
        self.updates += 1

    def add(self, name: str, value: torch.Tensor) -> None:
        """Count a number in, on the device."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self.last_step - self.began
        world = trainer.world_size
        counts = {GRADIENT: max(1, self.updates)}
        totals = {name: total / counts.get(name, self.steps) for name, total in self.sums.items()}
        means = {name: float(trainer.strategy.reduce(total)) for name, total in totals.items()}
        if not trainer.is_global_zero:
            return
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or trainer.current_epoch + 1
        result = self.evaluation.results[-1] if self.evaluation and self.evaluation.results else {}
        result = result if result.get("epoch") == epoch else {}
        found = {name: value for name, value in result.items() if isinstance(value, float)}
        speed = self.images * world / max(seconds, 1e-9)
        gone = self.seconds - self.seconds_before
        left = gone / (epoch - self.first_epoch) * (epochs - epoch)
        assert isinstance(pl_module, Method)
        chance = pl_module.chance_loss()
        row: dict[str, int | str] = {
            "epoch": epoch,
            "step": trainer.global_step,
            **{name: f"{value:.6g}" for name, value in means.items()},
            **{name: f"{value:.6g}" for name, value in (pl_module.scheduled | rates(trainer)).items()},
            **{name: f"{value:.6g}" for name, value in found.items()},
            **({} if chance is None else {"chance": f"{chance:.6g}"}),
            "images_per_second": f"{speed:.1f}",
            "seconds": f"{seconds:.3f}",
            **self.waiting(trainer, seconds),
        }
        self.folder.append_metrics(row)
        for logger in trainer.loggers:
            logger.log_metrics(
                {k: float(v) for k, v in row.items() if k not in ("epoch", "step")}, step=trainer.global_step
            )
        self.console.print(line(epoch, epochs, {**means, **found}, speed, left), highlight=False)
        for warning in self.warnings(means, result, chance, epoch / epochs):
            self.console.print(f"[yellow]warning[/yellow] {escape(warning)}")

    def waiting(self, trainer: Trainer, seconds: float) -> dict[str, str]:
        """`WAITING` of the epoch, of this process; nothing where the batches come from a loader that does not say."""
        gone = waited(trainer)
        return {} if gone is None else {WAITING: f"{min(1.0, (gone - self.waited_before) / max(seconds, 1e-9)):.4f}"}

    def warnings(
        self, means: Mapping[str, float], result: Figures, chance: float | None, behind: float = 1.0
    ) -> list[str]:
        """What the numbers of this epoch say is wrong: one sentence each, with the remedy, each told once.

        Args:
            behind: share of the training that is done with it.
        """
        self.losses.append(means.get("loss", math.nan))
        found = [result.get("warning"), diagnostics.judge(means), diagnostics.judge_nothing(self.losses[-1])]
        if chance is not None:
            found.append(diagnostics.judge_loss(self.losses, chance, behind))
        found.append(diagnostics.judge_mask(means.get("mask_rate", 0.0), behind))
        told = {re.sub(r"[\d.,%]+", "", sentence): sentence for sentence in found if sentence}  # whatever the numbers
        new = {key: sentence for key, sentence in told.items() if key not in self.warned}
        self.warned.update(new)
        return list(new.values())


def waited(trainer: Trainer) -> float | None:
    """Seconds for which batches were waited for so far; None where their loader does not say."""
    found: float | None = getattr(trainer.train_dataloader, "waited", None)
    return found


def rates(trainer: Trainer) -> dict[str, float]:
    """Where groups of parameters learn at different rates, each rate, and the lowest; ``lr`` is what they derive from.

    A rate is called by its multiple of ``lr``, as in ``lr/0.75``, or ``lr/constant`` where it stays at the peak.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    found = {float(group["lr"]) for group in groups}
    if len(found) < 2:
        return {}
    each = {
        "lr/constant" if group.get("constant_lr") else f"lr/{group.get('lr_scale', 1.0):.3g}": float(group["lr"])
        for group in groups
    }
    return {"lr_lowest": min(found), **dict(sorted(each.items(), reverse=True))}


#: results told in the epoch line, the first two there are; all others go to metrics.csv only
SHOWN: Mapping[str, str] = {
    "student_top1": "test {:.1%}",
    "teacher_top1": "average {:.1%}",
    "student_map": "test mAP {:.1%}",
    "student_r2": "test R² {:.3f}",
    "knn_top1": "kNN {:.1%}",
    "knn_map": "kNN mAP {:.1%}",
    "knn_r2": "kNN R² {:.3f}",
    "rank": "rank {:.1f}",
    "view_knn_top1": "kNN of views {:.1%}",
}


def line(epoch: int, epochs: int, figures: Mapping[str, float], speed: float, left: float) -> str:
    """An epoch in a line that fits into 80 columns: loss, two results, images a second, seconds left."""
    parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}", f"loss {figures.get('loss', math.nan):#.4g}"]
    parts += [form.format(figures[name]) for name, form in SHOWN.items() if name in figures][:2]
    return "  ".join([*parts, f"{speed:.0f} images/s", f"{clock_text(left)} left"])
