"""Jobs inside other commands: every combination of a sweep runs, whatever becomes of the others, on any devices."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfsight import cli
from selfsight.engine.outcome import Outcome
from selfsight.errors import UserError
from selfsight.jobs import launch, pretrain
from selfsight.runs import processes
from selfsight.runs.processes import RUN_VARIABLE, TASK_VARIABLE


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Any]]:
    """Words and configuration of each run, which comes to its end at once, but seed 1 and 2."""
    found: list[tuple[list[str], Any]] = []

    def run(cfg: Any) -> None:
        assert RUN_VARIABLE not in os.environ
        os.environ[RUN_VARIABLE] = f"run {len(found)}"
        found.append((sys.argv[1:], cfg))
        if cfg.seed == 1:
            raise UserError("seed 1 is not liked")
        if cfg.seed == 2:
            raise ValueError("a bug")

    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.setattr(pretrain, "run", run)
    return found


def test_what_fails_is_told_and_the_others_run(
    ran: list[tuple[list[str], Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfsight", "typed"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "-m", "method=swav", "seed=1,-1,2,0", f"runs={tmp_path / 'a b'}"])
    assert stop.value.code == 1
    assert [cfg.seed for _, cfg in ran] == [1, 2, 0]
    assert {cfg.runs for _, cfg in ran} == {str(tmp_path / "a b")}
    *_, first, second, third = capsys.readouterr().err.splitlines()
    assert first == "  seed=1: seed 1 is not liked"
    assert second.startswith("  seed=-1: seed is -1;")
    assert third == "  seed=2: ValueError: a bug"
    assert sys.argv == ["selfsight", "typed"]
    assert RUN_VARIABLE not in os.environ


def write_a_batch(folder: Path) -> None:
    """As many files as a batch has images; nobody reads them here."""
    folder.mkdir(parents=True)
    for i in range(256):
        (folder / f"{i}.jpg").touch()


def test_each_run_knows_its_own_command(
    ran: list[tuple[list[str], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that repeats it alone, and that Lightning starts again for further devices."""
    monkeypatch.chdir(tmp_path)
    write_a_batch(tmp_path / "d" / "x y")
    cli.run(["pretrain", "-m", "seed=0,3", "dataset=folder", "dataset.root=d/x y", f"runs={tmp_path}"])
    assert [cfg.seed for _, cfg in ran] == [0, 3]
    (job, *again), cfg = ran[1]
    repeated = cli.compose(job, cli.checked(job, again, sweep=False))
    assert repeated == cfg
    assert repeated.dataset.root == "d/x y"


def test_values_of_a_sweep_by_choice_range_and_pattern(ran: list[tuple[list[str], Any]], tmp_path: Path) -> None:
    cli.run(["pretrain", "-m", "method=glob([r*,p*],exclude=*x*)", "seed=range(3,8,2)", f"runs={tmp_path}"])
    assert [(cfg.choices.method, cfg.seed) for _, cfg in ran] == [("rotation", 3), ("rotation", 5), ("rotation", 7)]
    ran.clear()
    cli.run(["pretrain", "-m", "optimizer.lr=choice(0.1,0.2)", f"hydra.sweep.dir={tmp_path / 'there'}"])
    assert [(cfg.optimizer.lr, cfg.runs) for _, cfg in ran] == [(lr, str(tmp_path / "there")) for lr in (0.1, 0.2)]
    assert (tmp_path / "there" / "multirun.yaml").is_file()


# --- Optuna ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations of runs that end at once, the better the nearer the learning rate is to 1; seed 1 fails."""
    found: list[Any] = []

    def run(cfg: Any) -> Outcome:
        found.append(cfg)
        if cfg.seed == 1:
            raise UserError("seed 1 is not liked")
        away = abs(math.log(cfg.optimizer.lr))
        return Outcome({"knn_top1": 1 - away / 10, "loss": away})

    monkeypatch.setattr(pretrain, "run", run)
    return found


OPTUNA = ["pretrain", "-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(0.01,100))"]


@pytest.mark.parametrize("objective", ["knn_top1", "loss"])
def test_optuna_goes_by_a_figure(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    """Up for an accuracy, down for a loss; the best combination is told and kept."""
    where = [f"runs={tmp_path}", "batch_size=choice(4,8)", "hydra.sweeper.n_trials=12"]
    cli.run([*OPTUNA, f"objective={objective}", *where])
    assert len(measured) == 12
    assert len({cfg.optimizer.lr for cfg in measured}) == 12
    assert {cfg.batch_size for cfg in measured} == {4, 8}
    best = min(measured, key=lambda cfg: abs(math.log(cfg.optimizer.lr)))
    kept = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert kept.best_params["optimizer.lr"] == best.optimizer.lr
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("trial 1/12  optimizer.lr=")
    assert told[-1].startswith("best of 12: optimizer.lr=")
    later = sorted(abs(math.log(cfg.optimizer.lr)) for cfg in measured[10:])
    assert later[0] < 2, "it looks where it was good"


def test_optuna_goes_on_with_a_study(measured: list[Any], tmp_path: Path) -> None:
    study = [f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study_name=mine"]
    for _ in range(2):
        cli.run([*OPTUNA, "objective=knn_top1", "hydra.sweeper.n_trials=2", *study, f"runs={tmp_path}"])
    import optuna

    assert len(optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/study.db").trials) == 4


def test_what_a_file_says_is_tried(measured: list[Any], tmp_path: Path) -> None:
    words = ["pretrain", "-m", "hparams=lr", f"runs={tmp_path}", "hydra.sweeper.n_trials=3"]
    cli.run([*words, "hydra.sweeper.sampler=random"])
    assert len({cfg.optimizer.lr for cfg in measured}) == 3
    assert all(0.01 <= cfg.optimizer.lr <= 10 for cfg in measured)
    measured.clear()
    cli.run([*words, "optimizer.lr=range(1,4)", "hydra.sweeper.n_jobs=3"])  # the word typed has the last say
    assert {cfg.optimizer.lr for cfg in measured} <= {1, 2, 3}


def test_a_trial_that_fails_is_told_and_the_others_go_on(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*OPTUNA, "objective=knn_top1", "seed=choice(0,1)", "hydra.sweeper.n_trials=6", f"runs={tmp_path}"])
    assert stop.value.code == 1
    told = capsys.readouterr()
    failed = sum(cfg.seed == 1 for cfg in measured)
    assert 0 < failed < len(measured) == 6
    assert f"{failed} of 6 combinations failed" in told.err
    assert told.out.splitlines()[-1].startswith(f"best of {6 - failed}: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optimizer.lr=interval(1,2)"], "say which figure Optuna is to go by: objective=knn_top1."),
        (["objective=knn_top1", "optimizer.lr=1"], "nothing is to be tried"),
        (["objective=knn_top", "optimizer.lr=interval(1,2)"], "ends with knn_top1, loss. Did you mean 'knn_top1'?"),
        (["objective=loss", "optimizer.lr=interval(1,2)", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials is 0"),
        (["objective=loss", "optimizer.lr=interval(1,2)", "hydra.sweeper.sampler=tpa"], "Did you mean 'tpe'?"),
        (["objective=loss", "optimizer.lr=interval(1,2)", "+hydra.sweeper.trials=3"], "Did you mean 'n_trials'?"),
    ],
)
def test_what_optuna_cannot_do(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "-m", "hydra/sweeper=optuna", f"runs={tmp_path}", *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert len(measured) <= 1


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]])
def test_runs_in_processes_of_a_launcher(
    launcher: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know the folder and the module of the person's own; what fails there is told here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from lightning.pytorch import Callback\n\nclass Bell(Callback):\n    pass\n")
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "callbacks" / "bell.yaml").write_text("bell: {_target_: mine.Bell}\n")
    words = ["debug=smoke", "report=false", "evaluator.final={}", "callbacks=bell", "--config-dir", "conf"]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "-m", f"hydra/launcher={launcher[0]}", *launcher[1:], "seed=0,-1", *words])
    told = capsys.readouterr().err
    assert "1 of 2 combinations failed:\n  seed=-1: seed is -1;" in told
    (run,) = Path("runs").glob("*/backbone.safetensors")
    command = json.loads((run.parent / "environment.json").read_text())["command"]
    assert command[:4] == ["selfsight", "pretrain", "--config-dir", str(tmp_path / "conf")]
    assert "seed=0" in command


def test_ctrl_c_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seeds = []

    def stopped(cfg: Any) -> None:
        seeds.append(cfg.seed)
        raise SystemExit(130)

    monkeypatch.setattr(pretrain, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "-m", "seed=0,1", f"runs={tmp_path}"])
    assert stop.value.code == 130
    assert seeds == [0]


class Started:
    """Stands for a process, and remembers how it was started."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, list[tuple[list[str], dict[str, str]]]()

    def __call__(self, command: list[str], env: dict[str, str], **streams: Any) -> Started:
        self.calls.append((command, env))
        return self

    def wait(self) -> int:
        return self.status


def test_a_run_on_several_devices_has_processes_of_its_own(
    ran: list[tuple[list[str], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(0)
    monkeypatch.chdir(tmp_path)
    for place in "de":
        write_a_batch(tmp_path / place)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ["trainer.devices=1,2", "trainer.accelerator=cpu", "dataset=folder", "dataset.root=d,e", f"runs={tmp_path}"]
    cli.run(["pretrain", "-m", *words])
    assert [(cfg.trainer.devices, cfg.dataset.root) for _, cfg in ran] == [(1, "d"), (1, "e")]
    (command, environment), _ = started.calls
    assert command[1:4] == ["-m", "selfsight.cli", "pretrain"]
    assert {"trainer.devices=2", 'dataset.root="d"'} <= {word.lstrip("+") for word in command}
    assert "LOCAL_RANK" not in environment

    monkeypatch.setenv(TASK_VARIABLE, environment[TASK_VARIABLE])  # as it begins there, and again beside it
    cli.run(["--multirun", "whatever"])
    assert (ran[-1][1].trainer.devices, ran[-1][1].dataset.root) == (2, "d")


@pytest.mark.parametrize(("status", "error"), [(0, None), (1, UserError), (-9, UserError), (130, SystemExit)])
def test_how_such_a_run_ends(status: int, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Started(status))
    cfg = cli.compose("pretrain", ["trainer.devices=2", "trainer.accelerator=cpu"])
    if error is None:
        assert launch.run_nested_job("pretrain", cfg) is None
        return
    with pytest.raises(error, match="130" if status == 130 else f"ended with status {status}"):
        launch.run_nested_job("pretrain", cfg)


@pytest.mark.parametrize("error", [UserError("the loss is no number"), RuntimeError("the other end is gone")])
@pytest.mark.parametrize("ends", [True, False])
def test_only_one_process_tells_what_went_wrong(
    error: Exception, ends: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one speaks only when the first goes on and so has not met it."""

    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(cli, "first_has_ended", lambda: ends)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit if ends or isinstance(error, UserError) else RuntimeError):
        cli.main([])
    assert capsys.readouterr().err == ("" if ends or not isinstance(error, UserError) else f"selfsight: {error}\n")


def test_the_first_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Now, or before this one has met what the first ended of."""
    parents = iter([processes.PARENT, processes.PARENT, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert processes.first_has_ended(60)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert processes.first_has_ended(60)
    monkeypatch.setattr(os, "getppid", lambda: processes.PARENT)
    assert not processes.first_has_ended(0.01)


def command_line(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfsight.cli", "pretrain", *words, "debug=smoke", "report=false"]
    return subprocess.run(
        [*command, "evaluator.final={}", "trainer.devices=2"], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_every_combination_on_two_devices(tmp_path: Path) -> None:
    done = command_line("-m", "optimizer.lr=1e30,0.01", f"runs={tmp_path}")
    assert done.returncode == 1
    assert "1 of 2 combinations failed" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())  # the one that failed leaves nothing
    assert (run / "backbone.safetensors").is_file()
    command = json.loads((run / "environment.json").read_text())["command"]
    assert command[:2] == ["selfsight", "pretrain"]
    assert "optimizer.lr=0.01" in command


@pytest.mark.slow
def test_a_mistake_on_two_devices_is_one_sentence(tmp_path: Path) -> None:
    done = command_line("optimizer.lr=1e30", "trainer.max_epochs=3", f"runs={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("selfsight: ")
    assert not list((tmp_path / "runs").iterdir())
