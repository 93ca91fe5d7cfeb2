"""Numbers of a training that the monitor works out itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from selfsight import cli
from selfsight.datamodules.loading import loader
from selfsight.datamodules.loading.order import Order, Request
from selfsight.datamodules.loading.reader import RawBatch
from selfsight.engine.monitor import Monitor, rates
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.options import TrainerOptions
from selfsight.methods import BarlowTwins, LeJEPA, VICReg
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder


def test_the_norm_is_that_of_the_whole_gradient_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    nothing: Any = None
    parts = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": parts[:1]}, {"params": parts[1:], "lr": 0.1}], lr=0.3)
    folder, console = RunFolder(tmp_path), make_console()
    guard = NanGuard(folder, console, TrainerOptions(), 0)
    first, second = (Monitor(folder, console, None, guard) for _ in range(2))
    parts[0].grad, parts[1].grad = torch.tensor([3.0]), torch.tensor([4.0, 0.0])
    first.on_before_optimizer_step(nothing, nothing, optimizer)
    second.load_state_dict(first.state_dict())
    parts[0].grad, parts[1].grad = torch.tensor([0.0]), torch.tensor([0.0, 7.0])
    second.on_before_optimizer_step(nothing, nothing, optimizer)
    assert (float(second.sums["grad_norm"]), second.updates) == (12.0, 2)


@pytest.mark.slow
def test_a_collapse_is_told_once_though_the_loss_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fifty times the learning rate, on images as dark and even as a microscope's."""
    rng = np.random.default_rng(0)
    (tmp_path / "dark").mkdir()
    for i in range(128):
        coarse = cv2.resize(rng.normal(0.02, 0.01, (8, 8, 3)), (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "dark" / f"{i}.png"), (coarse * 255).clip(0, 255).round().astype(np.uint8))
    data = [f"dataset.root={tmp_path / 'dark'}", "dataset.mean=[0.02,0.02,0.02]", "dataset.std=[0.01,0.01,0.01]"]
    words = ["dataset=folder", *data, "dataset.image_size=32", "backbone=resnet_digits", "evaluator.final={}"]
    length = ["batch_size=32", "trainer.max_epochs=3", "report=false", "num_workers=0", f"runs={tmp_path}", "name=run"]
    cli.main(["pretrain", *words, *length, "optimizer.lr=15"])
    assert capsys.readouterr().out.count("Collapse: all images get almost the same feature") == 1
    losses = [float(row["loss"]) for row in RunFolder(tmp_path / "run").read_metrics()]
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("constant", ["backbone", "projector"])
@pytest.mark.parametrize("method", ["vicreg", "barlow", "lejepa"])
def test_a_constant_is_said_of_methods_without_negatives(
    method: str, constant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All images get one feature, or features differ and all get one embedding, which is not zero."""
    kind = {"vicreg": VICReg, "barlow": BarlowTwins, "lejepa": LeJEPA}[method]
    make = kind.__init__

    def collapsed(self: Any, *args: Any, **settings: Any) -> None:
        make(self, *args, **settings)
        getattr(self, constant).register_forward_hook(lambda module, given, out: 0 * out + 1)

    monkeypatch.setattr(kind, "__init__", collapsed)
    words = [f"method={method}", "limit_images=32", "batch_size=8", "trainer.max_epochs=3", "evaluator.final={}"]
    cli.main(["pretrain", "debug=smoke", "report=false", *words, f"runs={tmp_path}", "name=run"])
    said = capsys.readouterr().out
    assert ("Collapse: all images get almost the same feature" in said) == (constant == "backbone")
    if method == "lejepa":  # which has no loss of guessing
        assert "Collapse: all images get almost the same embedding" in said or constant == "backbone"
    else:
        assert "which is guessing, for 3 epochs" in said
    row = RunFolder(tmp_path / "run").read_metrics()[-1]
    assert (float(row["feature_std"]) < 0.01) == (constant == "backbone")


def test_rates_are_told_by_group_where_there_are_several() -> None:
    parts = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": parts[:1]}, {"params": parts[1:2], "lr": 0.075, "lr_scale": 0.25}]
    trainer: Any = SimpleNamespace(optimizers=[torch.optim.SGD(groups, lr=0.3)])
    assert rates(trainer) == {"lr_lowest": 0.075, "lr/1": 0.3, "lr/0.25": 0.075}
    trainer.optimizers[0].add_param_group({"params": parts[2:], "lr": 0.5, "constant_lr": True})
    assert rates(trainer)["lr/constant"] == 0.5
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.3
    assert rates(trainer) == {}


def test_the_time_in_which_batches_were_waited_for_is_a_share_of_the_epoch(tmp_path: Path) -> None:
    nothing: Any = None
    batches = SimpleNamespace(waited=3.0)  # in the epochs before
    trainer: Any = SimpleNamespace(train_dataloader=batches)
    monitor = Monitor(RunFolder(tmp_path), make_console(), None, nothing)
    monitor.on_train_epoch_start(trainer, nothing)
    batches.waited += 1.0
    assert monitor.waiting(trainer, 4.0) == {"data_wait_share": "0.2500"}
    trainer.train_dataloader = []  # a loader of a person's own
    assert monitor.waiting(trainer, 4.0) == {}


def test_a_loader_counts_the_time_in_which_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: clock))

    class Slow:
        def __getitem__(self, request: Request) -> RawBatch:
            nonlocal clock
            clock += 1
            return RawBatch(0, 0, torch.zeros(2))

    batches = loader.Loader(Slow(), Order(4, 2), lambda raw: raw, workers=0)
    for _ in batches:
        clock += 10  # is work
    assert batches.waited == 2
