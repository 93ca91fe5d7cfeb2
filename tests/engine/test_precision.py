"""Precision by trying: what is found is kept in the run, told, and not tried again."""

from __future__ import annotations

import importlib
import itertools
import statistics
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import selfsight
from selfsight import cli
from selfsight.engine import precision

SMALL = ["debug=smoke", "report=false", "trainer.precision=fastest"]


def of_machine(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """A machine on which bf16-mixed is ``gain`` times as fast as float32."""
    for module in ("selfsight.engine.precision", "selfsight.jobs.profile"):
        monkeypatch.setattr(f"{module}.bf16_gain", lambda: gain)


@pytest.mark.parametrize(("gain", "kept"), [(2.4, "bf16-mixed"), (1.05, "32-true"), (0.1, "32-true")])
def test_a_run_keeps_the_precision_that_was_found_faster(
    gain: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_machine(monkeypatch, gain)
    typed = ["pretrain", *SMALL, f"runs={tmp_path}", "name=x", "resume=auto"]
    cli.main(typed)
    assert OmegaConf.load(tmp_path / "x" / "config.yaml").trainer.precision == kept
    assert f"precision: {kept}, since {precision.bf16_told(gain)}" in capsys.readouterr().out
    of_machine(monkeypatch, 100.0)  # elsewhere it would be another one
    cli.main(typed)
    assert capsys.readouterr().out.startswith(f"'{tmp_path / 'x'}' is finished; ")


def test_processes_started_from_outside_do_not_try_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main(["pretrain", *SMALL, "trainer.devices=2", f"runs={tmp_path}"])
    assert "name one: trainer.precision=bf16-mixed or 32-true" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gain", "said"), [(2.4, True), (0.5, False)])
def test_profile_says_where_bf16_would_be_faster(
    gain: float, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_machine(monkeypatch, gain)
    cli.main(["profile", "debug=smoke", "warmup=0", "steps=1"])
    told = "bf16-mixed is 2.4 times as fast as float32 here, where the network is the bottleneck"
    assert (told in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("gain", "told"),
    [
        (2.4, "bf16-mixed is 2.4 times as fast as float32 here: trainer.precision=bf16-mixed"),
        (0.5, "float32 is 2.0 times as fast as bf16-mixed here; float32 is the default"),
    ],
)
def test_doctor_says_which_of_the_two_is_faster(
    gain: float, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_machine(monkeypatch, gain)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)  # it takes seconds, and is not what is asked
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["doctor"])
    assert told in capsys.readouterr().out


def test_trying_compares_the_two_and_leaves_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that gives bf16 a third of the time."""
    import torch

    times = iter([3.0, 1.0] * 2)
    monkeypatch.setattr(precision, "_seconds", lambda action: next(times))
    state = torch.get_rng_state()
    assert precision.bf16_gain(seconds=0) == pytest.approx(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_bf16_ends_where_float32_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kNN on the digits over three seeds: the means differ by no more than the seeds do, and both have learned."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bf16 = importlib.import_module("bf16")
    found: dict[str, list[dict[str, float]]] = {choice: [] for choice in bf16.PRECISIONS}
    for choice, seed in itertools.product(found, range(3)):
        run = selfsight.pretrain(
            seed=seed, trainer={"precision": choice, "max_epochs": 8}, backbone={"width": 4}, report=False,
            evaluator={"online": {"every": 1000}}, runs=tmp_path, name=f"{choice}-{seed}",
        )  # fmt: skip
        found[choice].append({of: run.summary[of]["knn_top1"] for of in ("pretrained", "untrained")})
    trained = {choice: [figures["pretrained"] for figures in of] for choice, of in found.items()}
    assert bf16.apart(trained) < bf16.MOST
    for of in found.values():
        assert statistics.mean(figures["pretrained"] - figures["untrained"] for figures in of) > 0.02
    assert trained["32-true"] != trained["bf16-mixed"]
