"""The benchmark of GPUs: on one its goals, and everywhere else that all of it runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_its_cpu_form_measures_every_method_and_a_training(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.end_to_end, "has_lightly", lambda: False)
    rows = {row["name"]: row for row in bench.run(torch.device("cpu"), bench.SMALL, steps=1)}
    pairs = ("ours_plain", "graphs_ours")
    of_methods = {f"gpu_{method}_resnet18_32px_{pair}" for method in bench.VIEWS for pair in pairs}
    assert rows.keys() == {*of_methods, "gpu_simclrv2_resnet18_32px_goal", "gpu_wait"}
    for name in rows.keys() - {"gpu_wait"}:
        assert rows[name]["ratio"] == pytest.approx(rows[name]["ours"] / rows[name]["peer"])
    assert rows["gpu_simclrv2_resnet18_32px_goal"]["peer"] == 25_000
    assert 0 < rows["gpu_wait"]["ours"] < 1
    assert rows["gpu_wait"]["ratio"] == pytest.approx(0.05 / rows["gpu_wait"]["ours"])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_goals_on_a_gpu(bench: ModuleType) -> None:
    goals = [row for row in bench.run() if row.get("target")]
    assert len(goals) == 3
    for row in goals:
        assert row["ratio"] >= row["target"], row
