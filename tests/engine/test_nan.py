"""Loss or gradient that is no number: the run stops and keeps the step, to be done again; or the step is left out."""

from __future__ import annotations

import copy
import io
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selfsight import cli
from selfsight.contracts import Batch
from selfsight.engine.broken_step import BrokenStep
from selfsight.engine.first_wrong import first_wrong
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.nn.queue import Queue
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock
from selfsight.runs.folder import RunFolder

from ..jobs.test_evaluate import refused
from ..small import SmallNet


class Remembering(Method):
    """Has one of each thing that moves: weights, momentum, running statistics, a queue, and a teacher of a kind."""

    def __init__(self) -> None:
        super().__init__(SmallNet())
        self.scale = nn.Parameter(torch.ones(8))
        self.memory = Queue(6, 8)
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        h = self.scale * self.backbone(batch.views[0])
        self.collect(rows=h.detach())
        return {"loss": h.square().sum(1).sqrt().mean()}  # whose derivative is none where h is 0

    def take_in(self, rows: Tensor) -> None:
        self.memory.push(rows)

    def after_step(self) -> None:
        self.steps += 1


def batches(*bad: int, count: int = 6) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(2, 3, 8, 8, generator=g) for _ in range(count)]
    for k in bad:
        views[k][1, 0, 3, 3] = torch.nan
    return [Batch([view], torch.arange(2) + 2 * k) for k, view in enumerate(views)]


class Snapshots(NanGuard):
    """Keeps what the method and its optimiser are after every batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        momentum = [state["momentum_buffer"] for state in trainer.optimizers[0].state_dict()["state"].values()]
        self.states.append(copy.deepcopy([*pl_module.state_dict().values(), *momentum]))


def learn(
    folder: Path, data: list[Batch], method: Method | None = None, accumulate: int = 1, **options: Any
) -> tuple[Snapshots, str]:
    """An epoch of the batches, and what is said."""
    torch.manual_seed(0)
    method = method or Remembering()
    said = io.StringIO()
    guard = Snapshots(RunFolder(folder), Console(file=said, width=200), TrainerOptions(**options), 3)
    momentum = {"momentum": 0.9}
    recipe = OptimizationRecipe(lambda groups, lr: torch.optim.SGD(groups, lr=lr, **momentum), 0.1)
    method.configure(recipe, Clock(12, 2, 1, 6))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulate, callbacks=[guard],
        enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(method, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return guard, said.getvalue()


def test_a_skipped_step_moves_nothing_that_learns(tmp_path: Path) -> None:
    guard, said = learn(tmp_path, batches(2), on_nan="skip")
    before, skipped, after = guard.states[1:4]
    for a, b in zip(before, skipped, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(skipped, after, strict=True))
    assert all(torch.isfinite(value).all() for value in guard.states[-1])
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert "warning the loss became nan in epoch 1 (step 2): the step is skipped" in said
    assert "1 of 6 steps were skipped" in said


def test_one_bad_batch_takes_its_whole_step_with_it(tmp_path: Path) -> None:
    guard, _ = learn(tmp_path, batches(3), accumulate=2, on_nan="skip")
    before, after = guard.states[1], guard.states[3]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    assert guard.skipped == 1


@pytest.mark.parametrize(
    ("bad", "bounds", "told"),
    [
        ((1, 2, 3), {"max_skips_in_a_row": 2}, r"more than trainer.max_skips_in_a_row=2 .* \(step 3\)"),
        ((0, 2, 4), {"max_skips": 2}, r"more than trainer.max_skips=2 .* \(step 4\)"),
    ],
)
def test_skipping_has_a_bound(bad: tuple[int, ...], bounds: dict[str, int], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        learn(tmp_path, batches(*bad), on_nan="skip", **bounds)
    assert BrokenStep.read(tmp_path / "broken_step.pt").batch == bad[-1]


def test_the_step_is_kept_as_it_was_before_it_went_wrong(tmp_path: Path) -> None:
    method, data = Remembering(), batches(3)
    with pytest.raises(UserError, match=r"the loss became nan in epoch 1 \(step 3\); .* selfsight replay run="):
        learn(tmp_path, data, method)
    kept = BrokenStep.read(tmp_path / "broken_step.pt")
    assert (kept.epoch, kept.step, kept.batch, kept.seed, kept.precision) == (0, 3, 3, 3, "32-true")
    torch.testing.assert_close(kept.whole.views[0], data[3].views[0], equal_nan=True, rtol=0, atol=0)  # type: ignore[union-attr]
    assert kept.whole.indices.tolist() == [6, 7]  # type: ignore[union-attr]
    assert all(torch.isfinite(value).all() for value in kept.state.values())
    again = Remembering()
    again.load_state_dict(kept.state)
    loss, found = first_wrong(again, kept.whole, kept.step)
    assert math.isnan(loss)
    assert found == "the views before the step: view 1, 1 of 384 values of [2, 3, 8, 8] are no numbers"


def test_a_gradient_that_is_no_number_though_the_loss_is_one(tmp_path: Path) -> None:
    data = batches()
    data[1].views[0].zero_()
    torch.manual_seed(0)
    method = Remembering()
    with torch.no_grad():
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(-1.0)  # of images that are all 0, nothing is left behind the ReLU
    with pytest.raises(UserError, match=r"a gradient became no number in epoch 1 \(step [01]\); loss and weights are"):
        learn(tmp_path, data, method, look_every=1)
    kept = BrokenStep.read(tmp_path / "broken_step.pt")
    again = Remembering()
    again.load_state_dict(kept.state)
    loss, found = first_wrong(again, kept.whole, kept.step)
    assert math.isfinite(loss)
    assert found == "div, 2 of 2 values of [2] are no numbers, on the way back; the gradient of scale"


def test_looks_that_come_too_late_to_keep_the_step_say_how_it_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss became nan in epoch 1 \(step 3\).*trainer.look_every: 1 in '.*'"):
        learn(tmp_path, batches(2), look_every=4)
    assert not (tmp_path / "broken_step.pt").exists()


def test_what_of_these_options_cannot_be() -> None:
    with pytest.raises(UserError, match=r"trainer.look_every=10 sees a step when it has been taken"):
        TrainerOptions(on_nan="skip", look_every=10)
    with pytest.raises(UserError, match=r"trainer.precision=16-mixed skips steps .* by itself"):
        TrainerOptions(on_nan="skip", precision="16-mixed")


def test_a_run_that_stops_is_replayed_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "one"
    told = refused(capsys, "pretrain", "debug=smoke", "method.temperature=1e-42", f"runs={tmp_path}", "name=one")
    assert f"Which tensor went wrong first: selfsight replay run={run}" in told
    cli.main(["replay", f"run={run}"])
    said = capsys.readouterr().out
    assert "epoch 1, step 0: the loss became nan; the loss was nan, done again it is nan" in said
    assert re.search(r"first: div, \d+ of 1024 values of \[8, 128\] are no numbers \(ntxent\.py:", said)
    (run / "broken_step.pt").write_bytes(b"")
    assert "broken_step.pt' cannot be read" in refused(capsys, "replay", f"run={run}")
    (run / "broken_step.pt").unlink()
    assert "has kept no step that went wrong" in refused(capsys, "replay", f"run={run}")


OF_ONE_PROCESS = """
from selfsight.methods.simsiam import SimSiam
from selfsight.nn.distributed import rank

class Breaking(SimSiam):
    def training_step(self, batch, batch_idx):
        found = dict(super().training_step(batch, batch_idx))
        if rank() == 1 and self.step == 1:
            found["loss"] = found["loss"] + float("inf")
        return found
"""


@pytest.mark.slow
def test_two_processes_leave_out_the_step_that_one_of_them_found_wrong(tmp_path: Path) -> None:
    """A loss that is infinite has a gradient that is not: only by asking does the other one know."""
    (tmp_path / "breaking.py").write_text(OF_ONE_PROCESS)
    words = ["pretrain", "debug=smoke", "method=simsiam", "method._target_=breaking.Breaking", "trainer.devices=2"]
    words += ["trainer.on_nan=skip", "batch_size=8", "report=false", "evaluator.final={}", "name=two"]
    command = [sys.executable, "-m", "selfsight.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the step is skipped") == 1
    assert "1 of 2 steps were skipped" in done.stdout
    assert "loss nan" not in done.stdout
