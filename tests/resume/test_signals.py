"""Signals at every moment of a run: what is saved, what is said, with which status it ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsight import cli
from selfsight.engine import slurm
from selfsight.engine.checkpointing import GracefulInterrupt, epochs_done, read_checkpoint
from selfsight.evaluation import OnlineEvaluation
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.runs.folder import RUN_VARIABLE, RunFolder

WORDS = [
    "pretrain", "debug=smoke", "report=false", "evaluator.final={}", "evaluator.online.evaluators={}",
    "limit_images=16", "trainer.max_epochs=3", "trainer.limit_batches=2", "name=one", "resume=auto",
]  # fmt: skip
RUN = RunFolder(Path("runs/one"))


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in heard.items():
        signal.signal(number, handler)
    os.environ.pop(RUN_VARIABLE, None)


def typed(*more: str) -> int:
    """The exit status of the command."""
    os.environ.pop(RUN_VARIABLE, None)
    with pytest.raises(SystemExit) as end:
        cli.main([*WORDS, *more])
    assert isinstance(end.value.code, int)
    return end.value.code


def at_call(number: int, then: Callable[[], object], of: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does something else first when it is called for the ``number``-th time."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            then()
        return of(*args, **kwargs)

    return called


def send(*numbers: signal.Signals) -> Callable[[], None]:
    def sent() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sent


PLACES: dict[str, tuple[object, str, int]] = {  # whose function, which, and the call at which the signal comes
    "step": (SimCLRv2, "training_step", 4),
    "last step": (SimCLRv2, "training_step", 6),
    "evaluation": (OnlineEvaluation, "_evaluate", 2),
    "checkpoint": (torch, "save", 2),
}


@pytest.mark.parametrize(
    ("place", "number", "epochs"),
    [
        ("step", signal.SIGUSR1, 2),
        ("last step", signal.SIGTERM, 3),
        ("evaluation", signal.SIGHUP, 2),
        ("checkpoint", signal.SIGINT, 2),
    ],
)
def test_a_signal_saves_and_leaves(
    place: str,
    number: signal.Signals,
    epochs: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, call = PLACES[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at_call(call, send(number), getattr(owner, name)))
        assert typed() == 128 + number
    assert "stopped, state saved; go on with: selfsight pretrain resume=runs/one" in capsys.readouterr().out
    assert not RUN.summary.exists()
    assert epochs_done(RUN.checkpoint) == epochs
    if place != "last step":
        return
    cli.main(WORDS)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "what comes after the training is not waited for"
    assert [row["epoch"] for row in RUN.read_metrics()] == ["1", "2", "3"]
    assert RUN.summary.exists()


def test_a_launcher_has_its_signal_when_the_run_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit does it: its handler puts the job in the queue again, and leaves."""

    def requeue(number: int, frame: object) -> None:
        assert epochs_done(RUN.checkpoint) == 1
        sys.exit(99)

    before = signal.signal(signal.SIGUSR2, requeue)
    monkeypatch.setattr(SimCLRv2, "training_step", at_call(3, send(signal.SIGUSR2), SimCLRv2.training_step))
    assert typed() == 99
    assert read_checkpoint(RUN.checkpoint)["global_step"] == 3
    assert signal.signal(signal.SIGUSR2, before) is requeue


def scontrol(monkeypatch: pytest.MonkeyPatch, status: int = 0) -> Path:
    """SLURM's command, which notes what it is given; the file with its notes."""
    program, notes = Path("bin/scontrol"), Path("asked.txt").absolute()
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {notes}\necho 'Invalid job id specified' >&2\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent.absolute()), prepend=os.pathsep)
    return notes


def test_a_job_of_slurm_is_put_in_its_queue_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = scontrol(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for number, asked in ((signal.SIGTERM, []), (signal.SIGUSR1, ["requeue 17"])):  # by SIGTERM jobs are cancelled
        with monkeypatch.context() as patched:
            patched.setattr(SimCLRv2, "training_step", at_call(2, send(number), SimCLRv2.training_step))
            assert typed("requeue=true") == 128 + number
        assert (notes.read_text().splitlines() if notes.exists() else []) == asked
    assert "stopped, state saved" in (said := capsys.readouterr().out)
    assert "SLURM has job 17 in its queue again" in said
    cli.main([*WORDS, "requeue=true"])
    assert [row["epoch"] for row in RUN.read_metrics()] == ["1", "2", "3"]


def test_what_slurm_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.requeue().endswith("this run is none: SLURM_JOB_ID is not set")
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert "No such file or directory: 'scontrol'" in slurm.requeue()
    notes = scontrol(monkeypatch, status=1)
    expected = "scontrol requeue 17_2 did not put the job in its queue again: Invalid job id specified"
    assert slurm.requeue() == expected
    assert notes.read_text() == "requeue 17_2\n"


def test_a_second_one_stops_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    twice = send(signal.SIGINT, signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(SimCLRv2, "training_step", at_call(2, twice, SimCLRv2.training_step))
        assert typed() == 130
        said = capsys.readouterr().out
        again = "begin again with: selfsight pretrain resume=runs/one"
        assert f"stopped at once, before the first checkpoint; {again}" in said
        patched.setattr(SimCLRv2, "training_step", at_call(4, twice, SimCLRv2.training_step))
        assert typed() == 130
    assert "stopped at once, the last checkpoint is kept; go on with" in capsys.readouterr().out
    assert read_checkpoint(RUN.checkpoint)["epoch"] == 0


def test_an_evaluation_that_takes_too_long_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def long() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(GracefulInterrupt, "PATIENCE", 0.1)
    monkeypatch.setattr(OnlineEvaluation, "_evaluate", at_call(2, long, OnlineEvaluation._evaluate))
    assert typed() == 143
    assert "stopped at once, the last checkpoint is kept" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    cli.main(WORDS)
    assert [row["epoch"] for row in RUN.read_metrics()] == ["1", "2", "3"]


def test_an_interrupt_that_a_library_takes_for_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def composing(words: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)  # in this thread, so at once
        except KeyboardInterrupt:
            raise AttributeError("half of an object") from None

    monkeypatch.setattr(cli, "run", composing)
    for _ in range(2):  # nothing is left behind for the next command of this process
        before = signal.getsignal(signal.SIGINT)
        assert typed() == 130
        assert capsys.readouterr().err == "selfsight: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is before


#: writes to its terminal after that has been closed, and leaves its status in a file
WRITER = """
import pathlib, signal, sys, time
from selfsight.runs.console import leave_closed_terminal, make_console
signal.signal(signal.SIGHUP, lambda *_: None)
console = make_console()
console.print("ready")
signal.pause()
leave_closed_terminal()
console.print("saved")
sys.stderr.write("and said")
sys.stdout.flush()
pathlib.Path("written").touch()
"""


def test_a_closed_terminal_ends_no_run_before_it_has_saved() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{WRITER}"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    assert re.search(b"ready", os.read(ours, 1000))
    time.sleep(0.2)  # until it waits
    os.close(ours)
    assert process.wait(60) == 0
    assert Path("written").exists()
