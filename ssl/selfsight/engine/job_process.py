"""A job in a process of its own: what it is told, how it is stopped, and what it answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from omegaconf import DictConfig, OmegaConf

from selfsight.errors import UserError
from selfsight.files import write_text
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import SPREAD_VARIABLES, STOPPED, TASK_VARIABLE, on_first_process
from selfsight.trust import Trust, given

if TYPE_CHECKING:
    from selfsight.engine.outcome import Outcome


def run_in_subprocess(job: str, cfg: DictConfig, words: Sequence[str]) -> Outcome | None:
    """Run a job in a process of its own.

    Returns:
        Its headline figures.

    Raises:
        UserError: it did not come to its end; it has said why. SystemExit: it was stopped.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SPREAD_VARIABLES}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "figures.json"
        trusted = given()
        task = json.dumps([job, OmegaConf.to_container(cfg), str(answer), [trusted.everything, sorted(trusted.named)]])
        process = subprocess.Popen(
            [sys.executable, "-m", "selfsight.cli", *words],
            env={**environment, TASK_VARIABLE: task},
            stdout=written_to(sys.stdout),
            stderr=written_to(sys.stderr),
        )
        with passed_on(process):
            try:
                status = process.wait()
            except KeyboardInterrupt:  # it has heard the same Ctrl-C, and saves
                status = process.wait()
        if status > STOPPED:
            sys.exit(status)
        if status:
            raise UserError(f"`selfsight {job}` on its devices ended with status {status} and has said why.")
        return _read_outcome(answer)


@contextlib.contextmanager
def passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that ask this process to stop go on to the one that trains for it, which saves."""
    names = ("SIGTERM", "SIGUSR1", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda heard, _: process.send_signal(heard)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def written_to(stream: TextIO) -> TextIO | None:
    """The file behind a stream, for another process to write to; None, the terminal, where there is none."""
    try:
        stream.fileno()
    except (AttributeError, OSError):
        return None
    return stream


class Task(NamedTuple):
    """What a process is to do, and where its answer is waited for."""

    job: str
    cfg: DictConfig
    trust: Trust
    answer: Path

    @classmethod
    def given(cls) -> Task:
        """What `run_in_subprocess` has left for this process and those that Lightning starts beside it."""
        job, content, answer, (everything, named) = json.loads(os.environ[TASK_VARIABLE])
        cfg = OmegaConf.create(content)
        OmegaConf.set_struct(cfg, True)
        return cls(job, cfg, Trust(everything, frozenset(named)), Path(answer))

    def write(self, outcome: Outcome | None) -> None:
        """Answer with what the job has come to; the first process does it."""
        if outcome is not None and on_first_process() and self.answer.parent.is_dir():  # whoever asked for it is there
            folder = getattr(outcome, "folder", None)
            told = {"figures": dict(outcome), "folder": None if folder is None else str(folder.path)}
            write_text(self.answer, json.dumps(told, default=str))


def _read_outcome(answer: Path) -> Outcome | None:
    from selfsight.engine.outcome import Outcome

    if not answer.is_file():
        return None
    told = json.loads(answer.read_text(encoding="utf-8"))
    return Outcome(told["figures"], None if told["folder"] is None else RunFolder(Path(told["folder"])))
