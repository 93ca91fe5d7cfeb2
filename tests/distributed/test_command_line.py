"""`selfsight pretrain` on two processes of this machine: started, fed, and ended as a user does it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsight.runs.folder import RunFolder


def pretrain(runs: Path, *words: str) -> RunFolder:
    command = [sys.executable, "-m", "selfsight.cli", "pretrain", "debug=smoke", "trainer.devices=2", "batch_size=8"]
    command += ["report=false", "evaluator.final={}", f"runs={runs}", "name=two", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "batch 8 (2 × 4)" in done.stdout
    assert [run.name for run in runs.iterdir()] == ["two"], "the second process has a run folder of its own"
    folder = RunFolder(runs / "two")
    with folder.metrics.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]
    return folder


@pytest.mark.slow
def test_pixpro_whose_heads_are_not_all_in_use(tmp_path: Path) -> None:
    """Without the instance branch; DDP would wait for the gradient of a part that the loss does not depend on."""
    folder = pretrain(tmp_path, "method=pixpro", "method.instance_weight=0")
    assert folder.summary.is_file()
    assert (folder.path / "backbone.safetensors").is_file()


@pytest.mark.slow
def test_simmatchv2_fills_its_bank_from_both(tmp_path: Path) -> None:
    folder = pretrain(tmp_path, "method=simmatchv2", "labels.per_class=1", "mu=2")
    state = torch.load(folder.checkpoint, weights_only=True)["state_dict"]
    written = state["u_labels.data"].sum(1) > 0
    assert written.nonzero().flatten().tolist() == list(range(2 * 2 * 8))  # steps x mu x batch over both
    assert {"student", "teacher"} == set(folder.read_summary()["classifiers"])
