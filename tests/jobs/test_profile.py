"""`selfsight profile` gives every moment of a step to the part that took it, and names the part to change."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from selfsight import cli
from selfsight.datamodules import ImageDataModule
from selfsight.engine.stopwatch import PARTS, Stopwatch, bottleneck

WORDS = ["steps=4", "warmup=2", "batch_size=32", "limit_images=96", "trainer.accelerator=cpu"]


def table(told: str) -> dict[str, float]:
    """Milliseconds a step by label."""
    found = {}
    for label in [*PARTS.values(), "whole step"]:
        match = re.search(rf"{label}\D+([\d.]+)", told)
        assert match, f"{label} is missing in\n{told}"
        found[label] = float(match[1])
    return found


def test_the_slow_part_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sleep put into one part, and into no other, shows there: more than its length, and in the sentence."""
    monkeypatch.chdir(tmp_path)
    finish = ImageDataModule.finish

    def slow(self: ImageDataModule, raw: Any) -> Any:
        time.sleep(0.5)
        return finish(self, raw)

    monkeypatch.setattr(ImageDataModule, "finish", slow)
    cli.main(["profile", *WORDS])
    told = capsys.readouterr().out
    spent = table(told)
    assert spent["making views"] >= 500
    assert sum(spent[label] for label in PARTS.values()) == pytest.approx(spent["whole step"], rel=0.02)
    assert spent["waiting for data"] + spent["optimiser"] + spent["logging"] < 500
    assert spent["forward"] > 0.5
    assert spent["backward"] > 0.5
    assert "Making views takes" in told
    assert not list(tmp_path.iterdir()), "nothing is kept"


def test_parts_begin_and_end_where_they_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(1, 2, synchronise=False)
    for step in range(4):  # only steps 1 and 2 count
        for part, seconds in (("data", 1.0), ("forward", 2.0), (None, 5.0), ("backward", 3.0)):
            now[0] += seconds * (1 + step)
            watch.mark(part)
        watch.step += 1
    assert watch.counted == 2
    assert watch.seconds["data"] == 5
    assert watch.seconds["forward"] == 10
    assert watch.seconds["backward"] == 15
    assert sum(watch.seconds.values()) == 30


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"data": 0.5, "views": 0.1, "forward": 0.4}, "waits for data 50%"),
        ({"views": 0.5, "forward": 0.4, "data": 0.1}, "Making views takes 50%"),
        ({"optimiser": 0.4, "forward": 0.6}, "optimiser takes 40%"),
        ({"rest": 0.2, "log": 0.2, "forward": 0.6}, "40% of it"),
        ({"forward": 0.3, "backward": 0.6, "rest": 0.1}, "90% in forward and backward"),
    ],
)
def test_the_sentence(shares: dict[str, float], said: str) -> None:
    cfg = cli.compose("profile", [])
    assert said in bottleneck(dict.fromkeys(PARTS, 0.0) | shares, "cpu", cfg)


def test_understands_what_pretrain_does() -> None:
    profile, pretrain = cli.compose("profile", ["method=swav"]), cli.compose("pretrain", ["method=swav"])
    for key in ("method", "views", "optimizer", "schedule", "dataset", "backbone", "batch_size"):
        assert profile[key] == pretrain[key], key
    assert {*pretrain} - {*profile} == {"resume", "extend"}
    assert cli.choices("recipe", "profile") == cli.choices("recipe", "pretrain")


def test_a_recipe_with_further_steps_and_words_that_mean_nothing_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=simclrv2_3step", "debug=smoke", "steps=1", "warmup=1", "name=x", "runs=y", "report=true"]
    cli.main(["profile", *words])
    assert "1 steps of 4 images" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
