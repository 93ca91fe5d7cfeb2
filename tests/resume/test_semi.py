"""A semi-supervised run that stops and goes on ends bit for bit where one ends that never stopped."""

from __future__ import annotations

import copy

import pytest
import torch

from ..semi_supervised import SETTINGS, make, train


@pytest.mark.parametrize("name", SETTINGS)
def test_stopping_changes_nothing(name: str) -> None:
    whole = make(name)
    reported, optimizer = train(whole, name, range(9))

    first = make(name)
    _, half = train(first, name, range(5))
    saved = copy.deepcopy((first.state_dict(), half.state_dict()))
    second = make(name, seed=1)  # other weights and banks, all to be replaced
    resumed = second.configure_optimizers()
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again, _ = train(second, name, range(5, 9), resumed)

    for key in reported[-1]:
        assert [r[key].item() for r in again] == [r[key].item() for r in reported[5:]], key
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    for group, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], resumed.state[q]["momentum_buffer"])
