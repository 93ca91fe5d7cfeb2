"""`optimizer.sam`: every step is taken twice, and what is not a weight moves once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from selfsight.contracts import Batch
from selfsight.engine.checkpointing import StepSeeds
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.methods.byol import BYOL
from selfsight.methods.dino import DINO
from selfsight.methods.semi.simmatchv2 import SimMatchV2
from selfsight.methods.swav import SwAV
from selfsight.nn.distributed import world_size
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.sam import SAM, sharpness_aware
from selfsight.optim.schedule import Clock, Constant

from ..distributed.spawn import run_on
from ..every_method import B, batch_of, every_method, make, share, without_batch_statistics
from ..jobs.test_evaluate import refused
from ..small import SmallNet

STEPS = 3
SGD = partial(torch.optim.SGD, momentum=0.9)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(method: Method, batches: list[Any], accumulate: int, optimizer: Any, **options: Any) -> Method:
    schedules = {name: Constant(0.9) for name in method.schedules}
    clock = Clock(examples=B * STEPS, batch_size=B, epochs=1, steps_per_epoch=STEPS)
    method.configure(OptimizationRecipe(optimizer, 0.05, schedules), clock)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulate, callbacks=[StepSeeds(3)],
        enable_model_summary=False, use_distributed_sampler=False, **quiet, **options,
    )  # fmt: skip
    trainer.fit(method, DataLoader(batches, batch_size=None))
    return method


def learned(kind: type[Method], accumulate: int, optimizer: Any) -> dict[str, Tensor]:
    """All that a method is after steps of so many batches each, in train mode."""
    method, size = make(kind)
    batches = [batch_of(method, size, i) for i in range(STEPS * accumulate)]
    return train(method.double(), batches, accumulate, optimizer).state_dict()


@pytest.mark.parametrize("kind", every_method(), ids=lambda kind: kind.__name__)
def test_in_a_neighbourhood_of_no_size_every_method_learns_what_it_learns_without(kind: type[Method]) -> None:
    """Queues, banks, teachers, centres, thresholds and running statistics move once a step, and draws are the same."""
    plain = learned(kind, 2, SGD)
    for name, value in learned(kind, 2, sharpness_aware(SGD, sam="sam", sam_rho=0.0)).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-10, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("kind", [BYOL, DINO, SimMatchV2], ids=lambda kind: kind.__name__)
def test_in_bf16_both_gradients_are_of_the_weights_of_their_pass(kind: type[Method]) -> None:
    """Of no size it is the plain step, bit for bit, and what is cast for the first pass is not kept for the second.

    Not so SwAV's, which brings its prototypes to length 1 in each pass, and moves their last bit.
    """
    torch.set_default_dtype(torch.float32)

    def learned(optimizer: Any) -> dict[str, Tensor]:
        method, size = make(kind)
        batches = [batch_of(method, size, i) for i in range(2 * STEPS)]
        return train(method, batches, 2, optimizer, precision="bf16-mixed").state_dict()

    plain = learned(SGD)
    at_rest, nearby, further = (learned(sharpness_aware(SGD, sam="sam", sam_rho=rho)) for rho in (0.0, 0.05, 0.5))
    assert all(value.dtype != torch.bfloat16 for value in plain.values())
    for name, value in at_rest.items():
        assert torch.equal(value, plain[name]), name
    weights = [name for name, value in plain.items() if name.startswith("backbone.") and name.endswith("weight")]
    assert weights
    for name in weights:
        assert not torch.equal(nearby[name], plain[name]), name
        assert not torch.equal(further[name], nearby[name]), name


class Square(Method):
    """Its loss is that of a weight alone, times the images' mean."""

    def __init__(self) -> None:
        super().__init__(SmallNet())
        self.w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        return {"loss": batch.views[0].mean() * self.w.square().sum() / 2}


def images(*means: float) -> list[Batch]:
    return [Batch([torch.full((2, 3, 4, 4), m)], torch.arange(2)) for m in means]


def test_the_step_is_taken_by_the_gradient_of_all_batches_nearby() -> None:
    """By hand: batches of factors 1 and 3, whose mean is 2; the gradient at w' is 2 w', and w' = w + rho w / |w|."""
    method = train(Square(), images(1.0, 3.0), 2, sharpness_aware(torch.optim.SGD, sam="sam", sam_rho=0.5))
    nearby = torch.tensor([3.3, -4.4])
    torch.testing.assert_close(method.w.detach(), torch.tensor([3.0, -4.0]) - 0.05 * 2 * nearby)


def test_a_size_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"a neighbourhood that nothing looks at; add optimizer\.sam=sam or asam"):
        sharpness_aware(torch.optim.SGD, sam_rho=0.1)


class Moving(Square):
    """Moves a buffer of its own where it should collect."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        self.seen += 1
        return super().training_step(batch, batch_idx)


def test_state_that_would_move_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"Moving moves its 'Moving\.seen' in training_step; let it note .* collect"):
        train(Moving(), images(1.0), 1, sharpness_aware(torch.optim.SGD, sam="sam"))


def on_a_process(rank: int, kinds: list[type[Method]]) -> list[dict[str, Tensor]]:
    """What methods have learned from this process's share of the batches, two of them a step."""
    found = []
    W, options = world_size() if torch.distributed.is_initialized() else 1, {}
    if W > 1:
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": W, "LOCAL_WORLD_SIZE": W, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in said.items()})
        options = {"devices": W, "strategy": "ddp_find_unused_parameters_true", "plugins": [TorchElasticEnvironment()]}
    for kind in kinds:
        torch.set_default_dtype(torch.float32)  # the same first weights in processes with another default
        method, size = make(kind)
        torch.set_default_dtype(torch.float64)
        method = without_batch_statistics(method.double(), but_synchronised=True)
        method.train = lambda mode=True, method=method: method  # type: ignore[method-assign, assignment, misc]
        batches = [share(batch_of(method, size, i), rank, W) for i in range(2 * STEPS)]
        optimizer = sharpness_aware(SGD, sam="asam", sam_rho=0.5)
        found.append({**train(method, batches, 2, optimizer, **options).state_dict()})
        if W == 1:
            del method.train
    return found


def test_two_processes_equal_one() -> None:
    kinds: list[type[Method]] = [SwAV, SimMatchV2]
    expected = on_a_process(0, kinds)
    for process in run_on(2, on_a_process, kinds):
        for kind, one, two in zip(kinds, expected, process, strict=True):
            for name, value in one.items():
                close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
                close(two[name], value, msg=lambda t, n=f"{kind.__name__}: {name}": f"{n}: {t}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer.sam=asma"], "optimizer.sam is 'asma'; sam, asam or null was expected. Did you mean 'asam'?"),
        (["optimizer.sam=sam", "trainer.precision=16-mixed"], "trainer.precision=16-mixed scales it once"),
        (["optimizer.sam=sam", "optimizer._target_=torch.optim.LBFGS"], "LBFGS wants to do so too"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "pretrain", f"runs={tmp_path}", *words)
    assert not list(tmp_path.iterdir())


def test_it_takes_an_optimiser_that_knows_no_closure() -> None:
    class Plain(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    assert isinstance(SAM([torch.nn.Parameter(torch.ones(2))], 0.1, base=Plain).base, Plain)
