"""Tasks that start from others, several at a time."""

from __future__ import annotations

import os
import signal

import pytest

from selfsight.engine.tasks import in_order
from selfsight.errors import UserError


def doubled(task: tuple[str, int]) -> int:
    """Twice its number; at 0 the process is gone, as one that finds no memory left."""
    if task[1] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task[1]


def test_tasks_come_after_those_they_start_from() -> None:
    a, b, c = ("a", 1), ("b", 2), ("c", 3)
    found = list(in_order({c: b, b: a, a: None}, doubled, workers=2))
    assert found == [(a, 2), (b, 4), (c, 6)]
    assert found == list(in_order({c: b, b: a, a: None}, doubled, workers=1))


def test_a_worker_that_is_killed_is_one_sentence_with_the_task() -> None:
    first, killed = ("simclr", 5), ("swav", 0)
    tasks = in_order({first: None, killed: first}, doubled, workers=2)
    assert next(tasks) == (first, 10), "what was done before is not lost"
    with pytest.raises(UserError, match="doing swav 0 has ended without a word") as told:
        next(tasks)
    assert "simclr" not in str(told.value)
