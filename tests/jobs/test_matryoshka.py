"""`heads=matryoshka` and `dims` as they are typed: what is learned, measured, kept and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfsight import cli
from selfsight.runs.folder import RunFolder

from .test_evaluate import refused

SMOKE = ("pretrain", "debug=smoke", "method=supce", "heads=matryoshka")


def test_a_run_is_measured_at_each_of_its_dimensions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*SMOKE, "heads.dims=[8,32]", f"runs={tmp_path}", "name=x"])
    run = tmp_path / "x"
    assert "nested dimensions (MRL): the first 8, 32 features learn as all do" in capsys.readouterr().out
    assert {"loss_first_8", "loss_first_32"} <= RunFolder(run).read_metrics()[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    for row in ("untrained", "pretrained"):
        for figure in ("knn_top1", "linear_top1"):
            assert list(summary[row][f"{figure}_by_dim"]) == ["8", "32", "128"]
            assert summary[row][f"{figure}_by_dim"]["128"] == summary[row][figure]
    assert "knn_top1_by_dim" not in summary["pixels"], "pixels have no first ones"
    assert "<h2 id='dims'>Accuracy by dimension</h2>" in (run / "report.html").read_text()
    cli.main(["knn", f"run={run}", "evaluator.dims=[16]", "evaluator.k=[1]"])
    (record,) = (run / "eval").glob("knn*.json")
    assert list(json.loads(record.read_text())["result"]["knn_top1_by_dim"]) == ["16", "128"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["heads.dims=[8,400]"], "are [8, 400], of embeddings of 128 numbers; give different whole numbers from 1"),
        (["method=spark"], "heads=matryoshka cuts the pooled features that a head reads, and SparK has no such head"),
        (["evaluator.final.knn.dims=[4,4]"], "are [4, 4]; different numbers that ascend were expected: [4]"),
    ],
)
def test_what_cannot_be_is_a_sentence_before_training(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in " ".join(refused(capsys, *SMOKE, f"runs={tmp_path}", *words).split())
    assert not list(tmp_path.iterdir())
