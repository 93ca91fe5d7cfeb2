"""Run folders: whole files or none, nothing of others touched, and each run gone on with by the job that made it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfsight import cli
from selfsight.errors import UserError
from selfsight.files import write_text
from selfsight.jobs import distill, evaluate, launch
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import RUN_VARIABLE


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.setattr("selfsight.runs.folder.environment", dict)


def config(**keys: Any) -> Any:
    return OmegaConf.create({"runs": "runs", "name": None, **keys})


def made(path: Path, *, age: int = 0, **keys: Any) -> Path:
    """A folder with a configuration that was written ``age`` seconds ago."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(keys)))
    seconds = (path / "config.yaml").stat().st_mtime - age
    os.utime(path / "config.yaml", (seconds, seconds))
    return path


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_bytes(b"before")
    with pytest.raises(UserError, match=r"report.html' cannot be written \(No space left on device\)"):
        write_text(target, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_bytes() == b"before"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"):
        RunFolder.create(config(runs=str(tmp_path)), "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_metrics_of_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.csv").write_bytes(b"epoch,loss\r\n1,2\r\n")
    with pytest.raises(UserError, match=r"metrics.csv' cannot be written"):
        folder.append_metrics({"epoch": 2, "loss": 1})
    assert folder.read_metrics() == [{"epoch": "1", "loss": "2"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for place in (tmp_path / "taken", tmp_path / "nowhere" / "file"):
        with pytest.raises(UserError, match="cannot be written"):
            write_text(place, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_text_is_utf_8_and_lines_end_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "ü ± …\r\n\n")
    assert (tmp_path / "file").read_bytes() == "ü ± …\r\n\n".encode()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("picture")
    with pytest.raises(UserError, match="exists already and is no run"):
        RunFolder.create(config(runs=str(tmp_path), name="photos"), "run")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.jpg"]
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(config(runs=str(tmp_path), name="empty"), "run").path == tmp_path / "empty"


def test_a_configuration_that_refers_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not complete .*gone"):
        RunFolder.create(config(runs=str(tmp_path / "runs"), name="${gone}", seed="${gone}"), "run")
    assert not (tmp_path / "runs").exists()


def test_only_the_first_process_removes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(config(runs=str(tmp_path)), "run")
    monkeypatch.setenv("LOCAL_RANK", "1")
    folder.drop_unused()
    assert folder.path.is_dir()
    monkeypatch.setenv("LOCAL_RANK", "0")
    folder.drop_unused()
    assert not folder.path.exists()
    folder.drop_unused()


def test_last_is_the_newest_that_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in 'runs/' yet"):
        RunFolder.open("last")
    made(tmp_path / "runs" / "compare-digits", job="compare")
    with pytest.raises(UserError, match="no run in 'runs/' yet"):
        RunFolder.open("last")
    made(tmp_path / "runs" / "older", age=20, job="pretrain")
    made(tmp_path / "runs" / "newer", age=10, job="finetune")
    assert RunFolder.open("last").name == "newer"
    with pytest.raises(UserError, match="made by `selfsight compare` and is no run"):
        RunFolder.open("runs/compare-digits")
    (tmp_path / "runs" / "newer" / "config.yaml").write_text("seed: 0\n")  # the rest is lost
    with pytest.raises(UserError, match=r"newer/config.yaml' is not whole"):
        RunFolder.open("runs/newer")


@pytest.mark.parametrize(
    ("keys", "job"),
    [
        ({"job": "pretrain", "teacher": "x"}, "pretrain"),
        ({"method": {}, "start": None}, "pretrain"),
        ({"method": {}, "run": "x"}, "finetune"),
        ({"method": {}, "teacher": "x"}, "distill"),
        ({"steps": {}, "approaches": []}, "compare"),
    ],
)
def test_the_job_of_a_folder(tmp_path: Path, keys: dict[str, Any], job: str) -> None:
    """Those made before it was written into them, too."""
    assert RunFolder(made(tmp_path / "run", **keys)).job == job


def test_no_run_folder_names_the_one_beside_it(tmp_path: Path) -> None:
    made(tmp_path / "run-1", job="pretrain")
    with pytest.raises(UserError, match=r"is no run folder .* Did you mean '.*run-1'"):
        cli.run(["pretrain", f"resume={tmp_path / 'run1'}"])


def test_a_damaged_configuration(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    for text in ("a: [1", "a: ${b", "- 1"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config.yaml' (cannot be read as|is no) "):
            RunFolder.open(run)


@pytest.mark.parametrize(("job", "others"), [("finetune", ("pretrain", "distill")), ("distill", ("finetune",))])
def test_a_run_of_another_job_names_the_right_command(tmp_path: Path, job: str, others: tuple[str, ...]) -> None:
    run = made(tmp_path / "run", job=job)
    for other in others:
        with pytest.raises(UserError, match=f"selfsight {job} resume={run}$"):
            cli.run([other, f"resume={run}"])


def test_going_on_needs_no_other_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what has to be given in the beginning, or what the run was made with and this machine has not."""
    seen: list[Any] = []
    monkeypatch.setattr(distill, "run", seen.append)
    run = made(tmp_path / "run", method={}, teacher="x")
    cli.run(["distill", f"resume={run}"])
    assert seen[0].resume == str(run)


def test_last_is_written_down_as_the_run_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "run", seen.append)
    monkeypatch.setattr(distill, "run", seen.append)
    made(tmp_path / "runs" / "one", job="finetune")
    cli.run(["knn", "run=last"])
    cli.run(["distill", "teacher=last", "trainer.accelerator=cpu"])
    assert (seen[0].run, seen[1].teacher) == ("runs/one", "runs/one")
    assert seen[1].job == "distill"


def test_last_is_looked_for_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs" / "here", job="pretrain")
    made(tmp_path / "elsewhere" / "there", job="pretrain", age=60)
    for words, found in ((["run=last"], "here"), (["run=last", "runs=elsewhere"], "there")):
        cfg = launch.with_last_run(cli.compose("knn", words))
        assert Path(cfg.run).name == found
    with pytest.raises(UserError, match="there is no run in 'nowhere/' yet"):
        launch.with_last_run(cli.compose("knn", ["run=last", "runs=nowhere"]))
