"""Gradients cached over chunks of a batch equal those of the whole batch, for every loss that compares its images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfsight.engine.options import TrainerOptions
from selfsight.engine.performance import apply_performance_options
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.methods.byol import BYOL
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.nn.in_chunks import in_chunks

from ..every_method import batch_of, every_method, make, without_batch_statistics
from ..small import SmallNet

STEPS, CHUNK = 3, 4
COMPARING = [kind for kind in every_method() if make(kind)[0].across_images]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learn(kind: type[Method], **options: Any) -> tuple[dict[str, Tensor], list[int]]:
    """All that the method is after some steps, and how many views each call of the backbone's first layer took."""
    method, size = make(kind)
    method, sizes = without_batch_statistics(method), []
    trainer = TrainerOptions(channels_last=False, compile=False, **options)
    apply_performance_options(method, trainer, torch.device("cpu"))
    next(p for p in method.backbone.modules() if isinstance(p, nn.Conv2d)).register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    optimizer = method.configure_optimizers()
    for step in range(STEPS):
        torch.manual_seed(step)
        method.begin_step(step)
        optimizer.zero_grad()
        method.training_step(batch_of(method, size, step), step)["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
    return method.state_dict(), sizes


@pytest.mark.parametrize("kind", COMPARING, ids=lambda kind: kind.__name__)
def test_in_chunks_every_such_method_learns_what_it_learns_from_the_whole(kind: type[Method]) -> None:
    whole, sizes = learn(kind)
    assert max(sizes) > CHUNK, "nothing is cut"
    chunked, cut = learn(kind, grad_cache=CHUNK)
    assert max(cut) <= CHUNK
    assert sum(cut) > sum(sizes), "nothing is computed a second time"
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-10, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


class Noisy(SmallNet):
    """Drops activations, and normalises by its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_both_passes_draw_the_same_and_statistics_move_once() -> None:
    torch.manual_seed(0)
    plain, x = Noisy(), torch.randn(10, 3, 16, 16)
    chunked = copy.deepcopy(plain)
    in_chunks(chunked, CHUNK)

    def gradients(network: nn.Module, outputs: Tensor) -> list[Tensor]:
        loss = torch.logsumexp(outputs @ outputs.T, 1).mean()  # of all pairs
        return list(torch.autograd.grad(loss, list(network.parameters())))

    torch.manual_seed(1)
    expected = gradients(plain, torch.cat([plain(part) for part in x.split(CHUNK)]))  # the graphs of all at once
    after = torch.rand(1)
    torch.manual_seed(1)
    found = gradients(chunked, chunked(x))
    assert torch.equal(torch.rand(1), after)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(chunked.named_buffers(), plain.buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(a, b), name


def test_a_teacher_is_a_copy_of_the_network_itself() -> None:
    network = SmallNet()
    in_chunks(network, CHUNK)
    teacher = copy.deepcopy(network)
    assert teacher.forward.__self__ is teacher  # type: ignore[attr-defined]


def test_where_it_cannot_be() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"BYOL has none: trainer.accumulate adds up batches exactly"):
        apply_performance_options(make(BYOL)[0], TrainerOptions(grad_cache=4), cpu)
    with pytest.raises(UserError, match=r"leave out trainer.compile=true"):
        apply_performance_options(make(SimCLRv2)[0], TrainerOptions(grad_cache=4, compile=True), cpu)
