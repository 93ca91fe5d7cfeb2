"""What version 0.1.0 wrote goes on working: its run folders, and every name that stands in a configuration of its."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from safetensors.torch import load_file

import selfsight
from selfsight import cli
from selfsight.runs.folder import RUN_VARIABLE

HERE = Path(__file__).parent
RUNS = HERE / "runs"
#: everything that its files of `conf` named
TARGETS = (HERE / "targets.txt").read_text().split()
#: and what its run folders named
CONFIGS = {path: path.read_text() for path in RUNS.glob("*/config.yaml")}
WRITTEN = {name for text in CONFIGS.values() for name in re.findall(r"_target_: (\S+)", text)}
FINISHED = ("swav", "finetuned")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folders, where they were written: in ``runs`` of the working directory."""
    shutil.copytree(RUNS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    yield tmp_path / "runs"
    os.environ.pop(RUN_VARIABLE, None)


@pytest.mark.parametrize("target", sorted({*TARGETS, *WRITTEN}))
def test_every_target_resolves(target: str) -> None:
    found = get_object(target)
    assert callable(found)
    assert found.__name__ == target.rpartition(".")[2]


def test_the_folders_are_those_of_before() -> None:
    """They name neither choices nor callbacks: what this version writes would not test anything."""
    assert len(CONFIGS) == 4
    assert not any(re.search(r"^(choices|callbacks):", text, re.M) for text in CONFIGS.values())


@pytest.mark.parametrize("name", ["swav-stopped", "fixmatch-stopped"])
def test_a_stopped_run_goes_on_to_where_it_would_have_ended(name: str, runs: Path) -> None:
    cli.main(["pretrain", f"resume={runs / name}"])
    # the student's: what FixMatch carries away has been its average since
    state = torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    found = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    expected = load_file(HERE / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    carried = load_file(runs / name / "backbone.safetensors")
    assert carried.keys() == expected.keys()
    assert all(torch.equal(carried[key], found[key]) for key in found) == (name == "swav-stopped")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda told, key=key: f"{key}: {told}")
    assert json.loads((runs / name / "summary.json").read_text())["train_seconds"] > 0


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_reported_measured_and_loaded(name: str, runs: Path) -> None:
    run = runs / name
    cli.main(["report", f"run={run}", "projection=pca"])
    page = (run / "report.html").read_text()
    assert "Embedding map" in page
    assert name in page

    cli.main(["knn", f"run={run}", "evaluator.k=[1]"])
    knn = [json.loads(path.read_text())["result"] for path in sorted((run / "eval").glob("knn*.json"))]
    assert any("knn_k1_top1" in result for result in knn)
    cli.main(["linear", f"run={run}"])
    linear = json.loads((run / "eval" / "linear.json").read_text())["result"]
    assert linear["linear_top1"] > 0.2, "ten classes"

    cli.main(["embed", f"run={run}"])
    backbone = selfsight.load(run)
    assert not backbone.training
    with np.load(run / "features.npz") as features:
        assert features["test_x"].shape == (360, backbone.num_features)


def test_the_figures_of_a_finished_run_are_still_those(runs: Path) -> None:
    """Its kNN accuracy, measured again, is the one that it wrote down."""
    before = json.loads((RUNS / "swav" / "eval" / "knn.json").read_text())["result"]
    (runs / "swav" / "eval" / "knn.json").unlink()
    cli.main(["knn", f"run={runs / 'swav'}"])
    assert json.loads((runs / "swav" / "eval" / "knn.json").read_text())["result"] == pytest.approx(before, abs=0.01)


def test_a_fine_tuning_begins_from_one(runs: Path) -> None:
    cli.main(["finetune", f"run={runs / 'swav'}", "debug=smoke", "labels.per_class=1", "report=false", "name=again"])
    before, after = (json.loads((runs / name / "summary.json").read_text()) for name in ("finetuned", "again"))
    assert after["labels"] == before["labels"]
    assert after["classifiers"].keys() == before["classifiers"].keys()
