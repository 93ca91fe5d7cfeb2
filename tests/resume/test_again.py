"""The same command typed again, and a run that is given further epochs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsight import cli
from selfsight.engine import session
from selfsight.engine.checkpointing import Interrupted, epochs_done
from selfsight.errors import UserError
from selfsight.runs.folder import RUN_VARIABLE, RunFolder

WORDS = [
    "pretrain", "debug=smoke", "report=false", "evaluator.final={}", "evaluator.online.evaluators={}",
    "limit_images=16", "trainer.max_epochs=2", "trainer.limit_batches=1",
]  # fmt: skip
AUTO = [*WORDS, "name=one", "resume=auto"]


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    yield
    os.environ.pop(RUN_VARIABLE, None)


def run(*words: str) -> None:
    os.environ.pop(RUN_VARIABLE, None)
    cli.run(list(words))


def test_a_command_typed_again_begins_goes_on_and_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("runs") / "one" / "checkpoints").mkdir(parents=True)  # killed before it had its configuration

    def stopped(self: session.Session, processes: int) -> None:
        raise Interrupted

    with monkeypatch.context() as killed:
        killed.setattr(session.Session, "print_header", stopped)  # and before its first checkpoint
        with pytest.raises(SystemExit):
            run(*AUTO)
    assert not RunFolder(Path("runs/one")).began
    run(*AUTO)
    assert [row["epoch"] for row in RunFolder(Path("runs/one")).read_metrics()] == ["1", "2"]
    before = (Path("runs/one") / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    run(*AUTO)
    assert capsys.readouterr().out == "'runs/one' is finished; resume=runs/one extend=10 gives it ten epochs more.\n"
    assert (Path("runs/one") / "summary.json").stat().st_mtime_ns == before

    for word, told in {
        "optimizer.lr=0.5": "begun with optimizer.lr=0.002, and optimizer.lr=0.5 is asked for",
        "method=simsiam": "begun with method=simclrv2, and method=simsiam is asked for",
        "callbacks.x._target_=lightning.pytorch.callbacks.Timer": r"begun with callbacks.x._target_=nothing",
        "seed=1": "begun with seed=0, and seed=1 is asked for; leave it as it was, or give another name=.$",
        "trainer.max_epochs=9": "or give another name=, or lengthen it: resume=runs/one extend=7.$",
    }.items():
        with pytest.raises(UserError, match=told):
            run(*AUTO, word)
    with pytest.raises(UserError, match="name=NAME"):
        run(*WORDS, "resume=auto")


def test_sizes_by_rule_are_those_the_run_was_begun_with(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "pretrain", "recipe=small", "method=swav", "backbone=resnet_digits", "limit_images=160", "trainer.max_steps=3",
        "report=false", "evaluator.final={}", "evaluator.online.evaluators={}", "name=one", "resume=auto",
    ]  # fmt: skip
    run(*words)
    config = RunFolder(Path("runs/one")).config()
    assert (config.batch_size, config.method.num_prototypes) == (16, 30), "160 images decide"
    capsys.readouterr()
    run(*words)
    assert "is finished" in capsys.readouterr().out
    for word in ("batch_size=32", "method.num_prototypes=50", "method.temperature=0.2"):
        with pytest.raises(UserError, match=f"{word} is asked for"):
            run(*words, word)


def test_a_finished_run_is_given_further_epochs_once(capsys: pytest.CaptureFixture[str]) -> None:
    run(*WORDS, "name=short", "schedule.lr.warmup_epochs=0")
    folder = RunFolder(Path("runs/short"))
    shutil.copytree(folder.path, "runs/ended")
    with pytest.raises(UserError, match="resume=RUN"):
        run(*WORDS, "extend=3")
    capsys.readouterr()
    run("pretrain", "resume=runs/short", "trainer.max_epochs=+3")
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"3 epochs more than the 2 it had.*goes on from (\S+), where it had come to (\S+)", said)
    assert found is not None, said
    assert float(found[1]) > float(found[2]), "a cosine of five epochs is higher after two than one of two"
    assert epochs_done(folder.checkpoint) == 5
    assert [int(row["epoch"]) for row in folder.read_metrics()] == [1, 2, 3, 4, 5]
    assert (folder.config().trainer.max_epochs, folder.config().extend) == (5, 3)
    assert json.loads(folder.summary.read_text())["train_seconds"] > 0

    other = RunFolder(Path("runs/ended"))
    session.lengthen(other.config(), other, 3)
    session.lengthen(other.config(), other, 3)  # killed then, and typed again
    assert other.config().trainer.max_epochs == 5
    assert not other.summary.exists()
    with pytest.raises(UserError, match=r"has done 2 of its 5 epochs.*leave out extend=2"):
        run("pretrain", "resume=runs/ended", "extend=2")
