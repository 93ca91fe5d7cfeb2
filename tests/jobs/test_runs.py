"""`selfsight runs`: every run folder there is, in the order and with the state one asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfsight import cli
from selfsight.reporting import run_list
from selfsight.runs.folder import RunFolder


def made(place: Path, method: str, epochs: int, knn: float | None = None, *, changed: int = 0, extra: int = 0) -> None:
    (place / "checkpoints").mkdir(parents=True)
    (place / "config.yaml").write_text(
        f"job: pretrain\nchoices: {{method: {method}}}\nmethod: {{_target_: a.b.C}}\n"
        "dataset: {name: shapes}\ntrainer: {max_epochs: 7}\n"
    )
    folder = RunFolder(place)
    for epoch in range(1, epochs + 1):
        folder.append_metrics({"epoch": epoch, "loss": 1.0})
    if knn is not None:
        folder.write_summary({"pretrained": {"knn_top1": knn, "rank": 3.0}, "classifiers": {}})
    (place / "weights").write_bytes(b"\0" * extra)
    for path in place.rglob("*"):
        os.utime(path, (changed, changed))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", "swav", 7, 0.75, changed=3000)
    made(tmp_path / "b", "simclrv2", 7, 0.85, changed=2000, extra=5_000_000)
    made(tmp_path / "c", "swav", 3, changed=4000)
    made(tmp_path / "sweep" / "0", "byol", 0, changed=1000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("[1, 2")
    os.utime(tmp_path / "d" / "config.yaml", (1, 1))
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Cells of each row by the last part of its run."""
    cli.main(["runs", *words])
    lines = capsys.readouterr().out.splitlines()
    return {Path(line.split()[0]).name: line.split() for line in lines[2:]}


def test_every_run_is_listed_with_its_state_and_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, ".")
    assert list(rows) == ["c", "a", "b", "0", "d"]  # the newest first
    assert rows["a"][1:9] == ["pretrain", "swav", "shapes", "finished", "7/7", "75.0%", "3.0", "0.0"]
    assert rows["b"][8:10] == ["5.0", "MB"]
    assert rows["c"][4:6] == ["unfinished", "3/7"]
    assert "no epoch yet" in " ".join(rows["0"])
    assert rows["d"][1] == "damaged"


def test_order_and_conditions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(listed(capsys, ".", "sort=knn_top1"))[:2] == ["b", "a"]
    assert next(iter(listed(capsys, ".", "sort=size"))) == "b"
    assert list(listed(capsys, ".", "sort=run", "where=method=s*")) == ["a", "b", "c"]
    assert list(listed(capsys, ".", "where=state=unfinished,method=swav")) == ["c"]
    assert list(listed(capsys, ".", "where=run=a")) == ["a"]
    cli.main(["runs", ".", "where=method=mae"])
    assert capsys.readouterr().out == "no run in . that fits\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none"], "there is no folder 'none' to look for runs in"),
        (["sort=knn"], "Did you mean 'knn_top1'?"),
        (["where=sate=finished"], "Did you mean 'state'?"),
        (["where=finished"], "COLUMN=VALUE was expected"),
    ],
)
def test_words_that_cannot_be_meant(
    words: list[str], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["runs", *words])
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_run_of_ours(finished_run: Path) -> None:
    row = run_list.read(RunFolder(finished_run))
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (row.state, row.job) == (run_list.FINISHED, "pretrain")
    assert row.figures["knn_top1"] == summary["pretrained"]["knn_top1"]
    assert row.epochs == row.planned > 0
    assert float(RunFolder(finished_run).read_metrics()[-1]["grad_norm"]) > 0


def test_a_long_name_stays_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "simclrv2-photographs-of-flowers-" * 4
    made(place / "long" / name, "simclrv2", 7, 0.5)
    assert list(listed(capsys, "long")) == [name]


def test_a_run_named_without_its_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(place / "runs" / "x", "swav", 7)
    with pytest.raises(SystemExit):
        cli.main(["report", "run=x"])
    assert "'x' is no run folder (it has no config.yaml). Did you mean 'runs/x'?" in capsys.readouterr().err


def test_the_list_needs_no_torch(place: Path) -> None:
    made(place / "runs" / "x", "swav", 7)
    code = "import sys; from selfsight.cli import main; main(['runs']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place)
