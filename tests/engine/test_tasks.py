"""Tasks that start from others, several at a time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from selfsight.engine.tasks import in_order
from selfsight.errors import UserError


def doubled(task: tuple[str, int]) -> int:
    """Twice its number; at 0 the process is gone, as one that finds no memory left."""
    if task[1] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task[1]


def refused_beside_another(task: tuple[str, str]) -> None:
    """Refused as soon as the other task has begun, which writes its file at the end."""
    name, file = task
    begun = Path(f"{file}.begun")
    if name == "refused":
        while not begun.exists():
            time.sleep(0.05)
        raise UserError("no such batch")
    begun.touch()
    time.sleep(30)
    Path(file).touch()


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


def test_a_task_that_is_refused_ends_the_others(tmp_path: Path) -> None:
    file = tmp_path / "written"
    with pytest.raises(UserError, match="no such batch"):
        list(in_order({("other", str(file)): None, ("refused", str(file)): None}, refused_beside_another, workers=2))
    assert not file.exists(), "nobody is there any more who writes it"
