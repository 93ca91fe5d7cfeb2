"""An evaluator, a callback, a logger, an optimiser and an operation of a view."""

from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger


class Centroids:
    """An evaluator: share of the test images that lie nearest to the mean of their own class."""

    needs_labels = True
    protocol = "nearest class mean"

    def __call__(self, train, test):
        means = torch.stack([train.x[train.labels == c].mean(0) for c in train.labels.unique()])
        return {"centroid_top1": (torch.cdist(test.x, means).argmin(1) == test.labels).float().mean().item()}


class Diary(Callback):
    """A callback, Lightning's: one line an epoch in a file."""

    def __init__(self, file: str = "diary.txt") -> None:
        self.file = Path(file)

    def on_train_epoch_end(self, trainer, method):
        with self.file.open("a") as file:
            file.write(f"epoch {trainer.current_epoch}: {method.step + 1} steps\n")


class Ledger(CSVLogger):
    """A logger, Lightning's: every figure goes to it. `save_dir` is the run folder."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="ledger", version="")


class SignSGD(torch.optim.Optimizer):
    """An optimiser, PyTorch's: every weight moves by the learning rate (Bernstein et al. 2018)."""

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()  # Lightning's: forward and backward
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.mul_(1 - group["lr"] * group["weight_decay"]).add_(w.grad.sign(), alpha=-group["lr"])
        return loss


def darken(image):
    """A step of a view: ``[H, W, 3]`` uint8 to the same."""
    return image // 2
