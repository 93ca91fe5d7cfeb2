"""A step is an optimiser step: nothing that learns moves between the batches whose gradients add up to one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.methods.semi.comatch import CoMatch
from selfsight.methods.semi.fixmatch import FixMatch
from selfsight.methods.semi.freematch import FreeMatch
from selfsight.methods.semi.simmatch import SimMatch
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.swav import SwAV
from selfsight.nn.step_state import StepState
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

from ..every_method import batch_of, draws_of_the_whole, every_method, make, share, without_batch_statistics
from ..small import SmallNet

STEPS = 3
#: what PyTorch's layers count for themselves, batch by batch
OF_LAYERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def state(method: Method) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in method.state_dict().items() if not k.endswith(OF_LAYERS)}


def same(a: Tensor, b: Tensor) -> bool:
    """To the last bit but one: prototypes are put back on the sphere by every batch."""
    return torch.allclose(a, b, rtol=1e-14, atol=0)


def learn(kind: type[Method], parts: int, steps: int = STEPS, **changes: Any) -> tuple[Method, set[str]]:
    """The method after steps of ``parts`` batches each, and the names of what the first of them moved."""
    method, size = make(kind, **changes)
    method = without_batch_statistics(method)
    optimizer, moved = method.configure_optimizers(), set()
    for step in range(steps):
        whole, at_start = batch_of(method, size, step), {}
        for k in range(parts):
            method.begin_step(step)
            at_start = at_start or state(method)
            with draws_of_the_whole(step, k, parts):
                loss = method.training_step(share(whole, k, parts), k)["loss"] / parts
            if k == 0:  # prototypes are put back on the sphere before they are used
                at_start.update({name: p.detach().clone() for name, p in method.named_parameters()})
            loss.backward()
            for name, value in state(method).items():
                assert same(value, at_start[name]), f"{kind.__name__}: {name} moves within a step"
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step()
        if step == 0:
            moved = {name for name, value in state(method).items() if not same(value, at_start[name])}
    return method, moved


@pytest.mark.parametrize("kind", every_method(), ids=lambda kind: kind.__name__)
def test_a_step_of_several_batches_moves_what_one_batch_moves(kind: type[Method]) -> None:
    _, whole = learn(kind, 1, steps=1)
    _, parts = learn(kind, 3, steps=1)
    assert parts == whole
    assert any(name.startswith("backbone.") for name in parts)


#: without what looks at other images of the batch where that can be left out
ALONE: dict[type[Method], dict[str, Any]] = {FixMatch: {"da_m": None}, SimMatch: {"da_length": None}}
SUMS = [kind for kind in every_method() if not make(kind, **ALONE.get(kind, {}))[0].across_images]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUMS, ids=lambda kind: kind.__name__)
def test_where_the_loss_is_a_mean_over_images_three_batches_equal_one(kind: type[Method]) -> None:
    changes = {name: value for base, some in ALONE.items() if issubclass(kind, base) for name, value in some.items()}
    whole, _ = learn(kind, 1, **changes)
    parts, _ = learn(kind, 3, **changes)
    expected = parts.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(expected[name], value, rtol=1e-10, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    ("kind", "parts_of_it"),
    [
        (SwAV, ("queues.", "usage")),
        (SimCLRv2, ("memory.", "average.")),
        (FreeMatch, ("tau", "p_model", "hist")),
        (CoMatch, ("memory.", "alignment.")),
        (SimMatch, ("bank", "alignment.")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_where_it_is_not_the_state_takes_in_the_whole_batch_all_the_same(
    kind: type[Method], parts_of_it: tuple[str, ...]
) -> None:
    whole, moved = learn(kind, 1, steps=1)
    parts, _ = learn(kind, 3, steps=1)
    for part in parts_of_it:
        assert part == "average." or any(name.startswith(part) for name in moved), f"{part} does not move"
    for name, value in whole.state_dict().items():
        if name.startswith(parts_of_it):
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-10, atol=1e-10)


class Counting(Method):
    """Counts its calls."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.calls: list[str] = []

    def before_step(self) -> None:
        self.calls.append(f"before {self.step}")

    def training_step(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        self.calls.append("batch")
        return {"loss": self.backbone(batch).square().mean()}

    def after_step(self) -> None:
        self.calls.append(f"after {self.step}")


def test_a_trainer_calls_once_a_step() -> None:
    method = Counting(SmallNet(norm=nn.Identity))
    method.configure(OptimizationRecipe(torch.optim.SGD, 0.01), Clock(5, 1, 1, 3))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", barebones=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(method, DataLoader(torch.randn(5, 3, 8, 8), batch_size=1))
    two = ["before {0}", "batch", "batch", "after {0}"]
    expected = [call.format(step) for step in (0, 1) for call in two] + ["before 2", "batch", "after 2"]
    assert method.calls == expected


class Sums(StepState):
    """Adds up what it is given."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def take_in(self, rows: Tensor) -> None:
        self.total += rows.sum(0)


def test_rows_are_taken_in_together_and_those_of_a_broken_step_never() -> None:
    sums = Sums()
    assert sums.collect(rows=torch.ones(1, 2))["rows"].shape == (1, 2)
    assert sums.collect(rows=torch.ones(2, 2))["rows"].shape == (3, 2)
    assert not sums.total.any()
    sums.commit()
    sums.commit()
    assert sums.total.tolist() == [3, 3]
    sums.collect(rows=torch.ones(1, 2))
    sums.discard()
    sums.commit()
    assert sums.total.tolist() == [3, 3]


def test_a_step_that_broke_off_leaves_nothing_behind() -> None:
    method, size = make(SimCLRv2)
    assert isinstance(method, SimCLRv2)
    assert method.memory is not None
    method.begin_step(0)
    method.training_step(batch_of(method, size, 0), 0)
    method.begin_step(1)
    method.end_step()
    assert not method.memory.filled


def test_what_a_run_lacks_is_one_sentence() -> None:
    method = Counting(SmallNet(norm=nn.Identity))
    with pytest.raises(UserError, match=r"Counting knows no optimiser yet; call configure\(recipe, clock\)"):
        method.configure_optimizers()
    fixmatch, _ = make(FixMatch)
    fixmatch.recipe, fixmatch.scheduled = None, {}
    with pytest.raises(UserError, match="FixMatch follows a schedule 'teacher_momentum'"):
        fixmatch.begin_step(0)
