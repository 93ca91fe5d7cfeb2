"""The benchmark of whole trainings, in its smallest form and where something is missing."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("end_to_end")


def photos(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"class-{i % 2}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.mark.slow
def test_our_command_and_a_plain_loop(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both train in processes of their own, so this takes as long as two starts."""
    monkeypatch.setattr(bench, "THREADS", ())  # as many as the suite has told
    monkeypatch.setattr(bench, "cores", lambda: 1)
    case = replace(bench.small(bench.CASES["simclr32"]), peers={"loop": None}, bf16=None)
    rows = {row["name"]: row for row in bench.run(str(photos(tmp_path, 24)), 1, 0, 2, [case])}
    assert [*rows] == ["e2e_simclr32_loop", "e2e_simclr32_ready"]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"], rel=0.05)
        for figures in row["sides"].values():
            assert figures["steps"] == 2
            assert figures["first_step"] > 0.5  # torch alone takes longer to import
            assert 0 <= figures["wait"] < 1
            assert figures["cpu_image"] > 0


def test_quality_of_both_precisions_against_the_peer(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every side trains as long, lightly first, and each of ours has a row against it."""
    found = {"lightly": (0.2, 50.0), "ours": (0.3, 60.0), "ours_bf16": (0.5, 120.0)}
    asked: list[tuple[str, float]] = []

    def trained(case: object, side: str, root: Path, place: Path, seconds: float) -> dict[str, float]:
        asked.append((side, seconds))
        return {"knn": found[side][0], "steps": found[side][1]}

    monkeypatch.setattr(bench, "quality", trained)
    (tmp_path / "test").mkdir()
    for number in range(25):
        (tmp_path / "test" / f"{number}.jpg").touch()
    rows = {row["name"]: row for row in bench.of_quality(bench.CASES["simclr32"], [*found], tmp_path, tmp_path, 90.0)}
    assert asked == [(side, 90.0) for side in found]
    assert [*rows] == ["quality_simclr32_lightly", "quality_simclr32_bf16_lightly"]
    for row, ours in zip(rows.values(), (0.3, 0.5), strict=True):
        assert (row["ours"], row["peer"], row["ratio"]) == (ours, 0.2, pytest.approx(ours / 0.2))
        assert "25 test images, of which chance alone moves ±10.0%" in row["check"]
    assert "after 1.5 minutes and 120 steps against 50;" in rows["quality_simclr32_bf16_lightly"]["check"]


def test_what_cannot_be_measured_is_said(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "has_lightly", lambda: False)
    monkeypatch.setattr(bench, "bf16_unit", lambda: None)
    monkeypatch.setattr(bench, "cores", lambda: 1)
    monkeypatch.setattr(bench, "train", lambda *args, **options: pytest.fail("nothing is to be trained"))
    assert bench.run(str(photos(tmp_path, 24)), 1, 1, 2, [bench.CASES["simclr32"]]) == []
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:2]] == [
        "lightly is not installed here", "this CPU does not multiply in bfloat16 (AMX, AVX-512 BF16)",
    ]  # fmt: skip
    assert "this machine has one core" in said[2]
    assert "simclr32 is left out: the folder holds 20 JPEG files to train on" in said[3]
