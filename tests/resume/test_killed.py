"""A process killed by SIGKILL in the middle of a step: what it goes on to is, bit for bit, what never stopped."""

from __future__ import annotations

import csv
import json
import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsight import cli
from selfsight.runs.folder import RUN_VARIABLE, RunFolder

SMOKE = ["debug=smoke", "report=false", "trainer.max_epochs=10"]
CLOCK = {"seconds", "images_per_second", "data_wait_share"}


def go(*words: str) -> None:
    os.environ.pop(RUN_VARIABLE, None)
    try:
        cli.run(list(words))
    finally:
        os.environ.pop(RUN_VARIABLE, None)


def killed(words: list[str], run: Path) -> None:
    """Start the command and kill it as soon as ``run`` has a checkpoint, long before its last epoch."""
    folder = RunFolder(run)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in another order would differ in the last bit
    command = [sys.executable, "-m", "selfsight.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | threads)
    deadline = time.monotonic() + 300
    while not folder.checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    said = process.communicate()[0].decode()
    assert folder.checkpoint.is_file(), said
    assert not folder.summary.is_file(), "it has come to its end before it could be killed"


def left_by(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]], Any]:
    """Weights, metrics of all epochs but for the clock, figures of the classifiers."""
    folder = RunFolder(run)
    state = torch.load(folder.checkpoint, weights_only=True)["state_dict"]
    with folder.metrics.open() as file:
        rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(file)]
    figures = run / "classification.json"
    return state, rows, json.loads(figures.read_text()) if figures.is_file() else None


def assert_same(run: Path, other: Path) -> None:
    (state, rows, figures), (state_2, rows_2, figures_2) = left_by(run), left_by(other)
    assert state.keys() == state_2.keys()
    assert [key for key in state if not torch.equal(state[key], state_2[key])] == []
    assert len(rows) == 10
    assert rows == rows_2
    assert figures == figures_2


@pytest.mark.slow
def test_the_three_steps_each_killed(tmp_path: Path) -> None:
    then = "['debug=smoke','report=false','trainer.max_epochs=10']"
    words = ["pretrain", *SMOKE, "recipe=simclrv2_3step", "labels.per_class=1", f"runs={tmp_path}"]
    words += [f"then.finetune.words={then}", f"then.distill.words={then}"]
    stopped = tmp_path / "stopped"
    killed([*words, "name=stopped"], stopped)
    again = ["pretrain", f"resume={stopped}"]
    killed(again, stopped / "finetune")
    killed(again, stopped / "distill")
    go(*again)
    go(*words, "name=whole")
    for step in ("", "finetune", "distill"):
        assert_same(stopped / step, tmp_path / "whole" / step)


@pytest.mark.slow
def test_semi_supervised_training_killed(tmp_path: Path) -> None:
    words = ["pretrain", *SMOKE, "method=simmatchv2", "labels.per_class=1", "mu=2", f"runs={tmp_path}"]
    killed([*words, "name=stopped"], tmp_path / "stopped")
    go("pretrain", f"resume={tmp_path / 'stopped'}")
    go(*words, "name=whole")
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_the_soak_kills_and_tells_what_is_lost(tmp_path: Path) -> None:
    """Its short form: two kills, and a run that has ended otherwise is told from one that has not."""
    soak = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "soak.py"))
    injected, lost = soak["soak"](tmp_path, "fixmatch", 2, random.Random(0), ["labels.per_class=1"])
    assert injected["beginning"] >= 1
    assert lost == 0
    killed_run = RunFolder(tmp_path / "fixmatch-killed")
    content = torch.load(killed_run.checkpoint, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = content["state_dict"][name] + 1
    torch.save(content, killed_run.checkpoint)
    assert soak["differences"](killed_run, RunFolder(tmp_path / "fixmatch-whole")) == [name]
