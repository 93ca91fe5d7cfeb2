"""The processes that read: they share the work, end when it is over, and leave nothing to later ones."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from selfsight.datamodules.loading.loader import Loader
from selfsight.datamodules.loading.order import Order, Request
from selfsight.datamodules.loading.reader import RawBatch
from selfsight.datamodules.module import FEWEST

from .test_module import Student, fit, in_files, module, same
from .test_semi import module as semi


class WhoReads:
    """Batches whose labels are the number of the process that made them; it may do something before."""

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.before = before

    def __getitem__(self, request: Request) -> RawBatch:
        self.before()
        chosen = torch.tensor(request.indices, dtype=torch.int64)
        time.sleep(0.02)  # so that no process has the time to do the work of two
        return RawBatch(request.epoch, request.step, chosen, torch.full((len(chosen),), os.getpid()), [chosen[:, None]])


def reading(workers: int, before: Callable[[], Any] = lambda: None, **options: Any) -> Loader:
    order = Order(20, 8, shuffle=False, last="keep")
    return Loader(WhoReads(before), order, lambda raw: raw, workers=workers, **options)


def running() -> list[int]:
    return [process.pid or 0 for process in multiprocessing.active_children()]


def test_a_batch_is_read_by_all_processes_together() -> None:
    alone, shared = list(reading(2, once=True)), list(reading(2, once=True, shared=True))
    for one, both in zip(alone, shared, strict=True):
        assert torch.equal(one.indices, both.indices)
        assert torch.equal(one.views[0], both.views[0])
        assert (one.epoch, one.step) == (both.epoch, both.step)
        assert len(one.labels.unique()) == 1
        assert len(both.labels.unique()) == 2


def test_a_batch_smaller_than_the_number_of_processes() -> None:
    loader = Loader(WhoReads(), Order(3, 2, shuffle=False, last="keep"), lambda raw: raw, workers=3, shared=True)
    assert [batch.indices.tolist() for batch in loader] == [[0, 1], [2]]
    loader.close()


def test_parts_of_a_step_are_that_step() -> None:
    step = Request(2, 5, [7, 8, 9, 4, 1], [10, 11, 12, 13, 14])
    for number in (1, 2, 3, 7):
        parts = step.parts(number)
        assert len(parts) == number
        assert [i for part in parts for i in part.indices] == step.indices
        assert [i for part in parts for i in part.draws] == step.draws
        assert max(len(part.indices) for part in parts) - min(len(part.indices) for part in parts) <= 1
        assert {(part.epoch, part.step) for part in parts} == {(2, 5)}


def test_evaluations_share_their_batches(tmp_path: Path) -> None:
    data = in_files(tmp_path, images=FEWEST + 1, test_fraction=0)
    loader = module(data, num_workers=2).eval_dataloader("train")
    assert (loader._workers._loader.num_workers, loader._parts) == (2, 2)


def test_small_evaluations_start_few_processes(tmp_path: Path) -> None:
    data = in_files(tmp_path, images=14, test_fraction=0)
    assert len(data.train) < FEWEST
    made = module(data, num_workers=4)
    assert made.eval_dataloader("train")._workers._loader.num_workers == 1
    assert made.train_dataloader()._workers._loader.num_workers == 4


def test_closed_loaders_end_their_processes_and_may_begin_again() -> None:
    loader = reading(2)
    first = [batch.indices.tolist() for batch in loader]
    assert len(running()) == 2
    loader.close()
    assert running() == []
    loader.close()
    assert [batch.indices.tolist() for batch in loader] == first
    assert loader.epoch == 1
    unfinished = iter(loader)
    next(unfinished)
    loader.close()
    assert running() == []


def test_dropped_loaders_end_their_processes_at_once(tmp_path: Path) -> None:
    made = module(in_files(tmp_path, images=14), num_workers=2)
    gc.disable()
    try:
        for loader in [made.train_dataloader()]:
            for _ in loader:
                assert len(running()) == 2
        del loader
        assert running() == []
        made.close()
    finally:
        gc.enable()


def test_garbage_is_not_collected_in_the_processes_of_others(tmp_path: Path) -> None:
    """There, a loader that nobody has closed would complain that its processes are not its children."""

    def collect() -> None:
        sys.unraisablehook = lambda problem: (tmp_path / "complaint").write_text(str(problem.exc_value))
        gc.collect()

    gc.disable()
    try:
        forgotten: Any = reading(1)
        list(forgotten)
        forgotten.itself, found = forgotten, weakref.ref(forgotten)
        del forgotten
        list(reading(1, before=collect, once=True))
        found().close()
    finally:
        gc.enable()
    assert not (tmp_path / "complaint").exists()


def test_the_end_of_a_training_is_that_of_its_processes(tmp_path: Path) -> None:
    data = in_files(tmp_path / "set", images=14)
    made = module(data, num_workers=2, engine="device")
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    student = Student()
    trainer.fit(student, datamodule=made)
    assert running() == []
    assert made.state_dict() == {"epoch": 2, "batch": 0}
    alone = Student()
    fit(alone, data, 2, tmp_path)
    assert student.seen == alone.seen


@pytest.mark.parametrize(
    ("workers", "mu", "shares"),
    [(8, 7, (1, 7)), (8, 1, (4, 4)), (2, 7, (1, 1)), (1, 7, (1, 1)), (6, 5, (1, 5)), (0, 7, (0, 0))],
)
def test_few_and_many_share_the_processes(tmp_path: Path, workers: int, mu: int, shares: tuple[int, int]) -> None:
    data = in_files(tmp_path, images=20)
    made = semi(data, labels={"per_class": 2}, num_workers=workers, mu=mu, batch_size=2)
    loader = made.train_dataloader()
    found = tuple(
        0 if each._workers is None else each._workers._loader.num_workers
        for each in (loader.labelled, loader.unlabelled)
    )
    assert found == shares
    assert made.labelled.num_workers == workers  # for evaluation


def test_both_loaders_of_few_labels_are_closed(tmp_path: Path) -> None:
    data = in_files(tmp_path, images=20)
    made, alone = (semi(data, labels={"per_class": 2}, num_workers=workers, mu=3, batch_size=2) for workers in (2, 0))
    loader = made.train_dataloader()
    for one, other in zip(loader, alone.train_dataloader(), strict=True):
        assert same(one.labelled, other.labelled)
        assert same(one.unlabelled, other.unlabelled)
    assert len(running()) == 2
    made.teardown("fit")
    assert running() == []
