"""An evaluation by one process that takes longer than collectives wait does not end the others."""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from selfsight.evaluation import OnlineEvaluation

from .spawn import run_on

TIMEOUT = 1.0


class Slow(OnlineEvaluation):
    """Takes three times as long as collectives wait."""

    def _evaluate(self, *_: Any) -> None:
        time.sleep(3 * TIMEOUT)


def evaluated(rank: int, place: str) -> bool:
    """Both processes come through, in a group whose collectives wait for a second."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    trainer: Any = SimpleNamespace(is_global_zero=rank == 0, current_epoch=0, max_epochs=1)
    Slow({}).on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    return True


def test_the_others_wait_for_a_long_evaluation() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert run_on(2, evaluated, str(Path(folder) / "meet")) == [True, True]
