"""The order of the images: every epoch a permutation, shared by processes without overlap, the same after a stop."""

from __future__ import annotations

import pytest
import torch

from selfsight.datamodules.loading.order import Order, requests
from selfsight.errors import UserError


def test_epochs_are_different_permutations() -> None:
    order = Order(20, 4, seed=3)
    first, second = torch.cat(order.batches(0)), torch.cat(order.batches(1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat(Order(20, 4, seed=3).batches(0)))
    assert not torch.equal(first, torch.cat(Order(20, 4, seed=5).batches(0)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("last", ["drop", "fill"])
def test_processes_share_every_batch(world: int, last: str) -> None:
    order = Order(31, 6, last=last)
    whole = order.batches(2)
    parts = [order.batches(2, rank, world) for rank in range(world)]
    assert [torch.cat(step).tolist() for step in zip(*parts, strict=True)] == [batch.tolist() for batch in whole]


@pytest.mark.parametrize(("last", "lengths"), [("drop", [4, 4]), ("keep", [4, 4, 2]), ("fill", [4, 4, 4])])
def test_last_batch(last: str, lengths: list[int]) -> None:
    order = Order(10, 4, last=last)
    batches = order.batches(0)
    assert [len(batch) for batch in batches] == lengths
    assert order.steps == len(lengths)
    if last == "fill":
        assert batches[2][2:].tolist() == batches[0][:2].tolist()


def test_long_epochs_repeat_every_image_as_often() -> None:
    order = Order(5, 4, examples=20)
    drawn = torch.cat(order.batches(0))
    assert drawn.bincount().tolist() == [4] * 5
    assert all(sorted(part.tolist()) == list(range(5)) for part in drawn.split(5))


def test_with_replacement_some_come_twice() -> None:
    drawn = torch.cat(Order(1000, 100, replacement=True).batches(0))
    distinct = len(drawn.unique()) / 1000
    assert 0.58 < distinct < 0.68  # 1 - 1/e = 0.632


def test_every_draw_has_its_own_number() -> None:
    order = Order(8, 4)
    numbers = [
        n for epoch in range(3) for rank in range(2) for r in requests(order, epoch, 0, rank, 2) for n in r.draws
    ]
    assert sorted(numbers) == list(range(24))


def test_one_process_numbers_draws_as_two_do() -> None:
    order = Order(8, 4)
    one = {(r.step, i): n for r in requests(order, 1, 0) for i, n in zip(r.indices, r.draws, strict=True)}
    two = {
        (r.step, i): n
        for rank in range(2)
        for r in requests(order, 1, 0, rank, 2)
        for i, n in zip(r.indices, r.draws, strict=True)
    }
    assert one == two


def test_start_in_the_middle() -> None:
    order = Order(12, 3)
    assert list(requests(order, 5, 2)) == list(requests(order, 5, 0))[2:]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 7, "batch_size": 8}, "batch_size is 8 and an epoch has 7 images; choose batch_size=7 or less"),
        ({"images": 0, "batch_size": 1}, "holds no image"),
        ({"images": 4, "batch_size": 0}, "batch_size is 0"),
        ({"images": 4, "batch_size": 2, "last": "dropp"}, "Did you mean 'drop'"),
        ({"images": 4, "batch_size": 2, "split": "strid"}, "Did you mean 'stride'"),
    ],
)
def test_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Order(**options)


def test_batch_that_cannot_be_shared() -> None:
    with pytest.raises(UserError, match="batch_size is 5 over all devices and there are 2 processes"):
        Order(10, 5).batches(0, 0, 2)
