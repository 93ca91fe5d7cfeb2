"""The folder of a run: everything a run writes, and nothing outside it."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfsight import trust
from selfsight.compat import as_it_was
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import write_text
from selfsight.runs.environment import environment
from selfsight.runs.processes import RUN_VARIABLE, on_first_process

#: jobs whose folder holds a run, and a key that only they have: older folders do not name their job
RUNS = {"distill": "teacher", "finetune": "run", "pretrain": "method"}
#: the same of all jobs that make a folder
ALONE = {**RUNS, "compare": "approaches"}


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoints" / "last.ckpt"
        self.metrics = path / "metrics.csv"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.labels = path / "labels.json"
        self.classification = path / "classification.json"
        self.data = path / "data.json"
        self.broken_step = path / "broken_step.pt"
        self.mlflow = path / "mlflow_run.txt"  # the id that MLflow has given it

    @classmethod
    def create(cls, cfg: DictConfig, stem: str) -> RunFolder:
        """Make ``<runs>/<name>`` (``<runs>/<stem>-<number>`` without a name), configuration and environment in it.

        Raises:
            UserError: the folder exists already, or cannot be written; nothing is left of it then.
        """
        runs = Path(cfg.runs).expanduser()
        if not on_first_process():
            return cls(_made_by_the_first(runs, cfg.name))
        text = _resolved_text(cfg)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder = cls(_claim(runs, cfg.name, stem))
        except OSError as error:
            raise UserError(
                f"the run folder cannot be made in '{runs}' ({error.strerror}); name a folder you may write: runs=DIR."
            ) from None
        try:
            folder.checkpoint.parent.mkdir(exist_ok=True)
            write_text(folder.path / "config.yaml", text)
            write_text(folder.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except BaseException:
            folder.drop_unused()
            raise
        os.environ[RUN_VARIABLE] = str(folder.path.resolve())
        return folder

    @classmethod
    def open(cls, path: str | Path, runs: str | Path = "runs") -> RunFolder:
        """An existing run. ``last`` is the newest one in ``runs``.

        Raises:
            UserError: there is no run at ``path``.
        """
        if str(path) == "last":
            made = sorted(Path(runs).expanduser().glob("*/config.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
            newest = next((run for run in (cls(p.parent) for p in made) if run.job in RUNS), None)
            if newest is None:
                raise UserError(
                    f"there is no run in '{runs}/' yet; `selfsight pretrain` makes one, runs=DIR names another folder."
                )
            return newest
        folder = Path(path).expanduser()
        if not (folder / "config.yaml").is_file():
            beside = [str(p.parent) for p in folder.parent.glob("*/config.yaml")] if folder.parent.is_dir() else []
            inside = Path(runs).expanduser() / folder
            meant = nearest(str(folder), [*beside, "last"])
            meant = f" Did you mean '{inside}'?" if (inside / "config.yaml").is_file() else meant
            raise UserError(f"'{folder}' is no run folder (it has no config.yaml).{meant}")
        run = cls(folder)
        if not run.job:
            raise UserError(
                f"'{folder / 'config.yaml'}' is not whole: it says neither of which job it is nor by which method; "
                "environment.json beside it has the command of the run."
            )
        if run.job not in RUNS:
            raise UserError(
                f"'{folder}' was made by `selfsight {run.job}` and is no run; its runs are in '{folder}/runs'."
            )
        return run

    @property
    def has_config(self) -> bool:
        """Whether a run has been begun here."""
        return (self.path / "config.yaml").is_file()

    @property
    def began(self) -> bool:
        """Whether there is something to go on from: a checkpoint, or the one before it."""
        return any(self.checkpoint.parent.glob("*.ckpt"))

    def tidy(self) -> None:
        """Remove what a run that was killed while it wrote a checkpoint has left of it."""
        if on_first_process():
            for part in self.checkpoint.parent.glob(".*.ckpt.*"):
                part.unlink(missing_ok=True)

    def drop_unused(self) -> None:
        """Remove the folder of a run that was refused before its first epoch ended; the first process does it."""
        if on_first_process() and not any(p.exists() for p in (self.checkpoint, self.metrics, self.broken_step)):
            shutil.rmtree(self.path, ignore_errors=True)

    def tracker_id(self) -> str | None:
        """Under which the run stands in a service that follows runs: drawn once, and kept in the folder.

        Returns:
            None on processes that do not speak to the service.
        """
        path = self.path / "tracker_id.txt"
        if not on_first_process():
            return None
        if not path.is_file():
            write_text(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    @property
    def job(self) -> str:
        """The job that made the folder."""
        cfg = self.config()
        return str(cfg.get("job") or next((job for job, key in ALONE.items() if key in cfg), ""))

    @property
    def name(self) -> str:
        return self.path.name

    def config(self) -> DictConfig:
        """What the run was made with. All that reads a run's configuration reads it here, where it is held to be data.

        Raises:
            UserError: the file is no configuration, or names what `trust.check` refuses to build.
        """
        path = self.path / "config.yaml"
        try:
            cfg = OmegaConf.load(path)
        except Exception as error:  # of the disk, of YAML, of OmegaConf
            raise UserError(f"'{path}' cannot be read as a configuration ({' '.join(str(error).split())}).") from None
        if not isinstance(cfg, DictConfig):
            raise UserError(f"'{path}' is no configuration of a run.")
        content = OmegaConf.to_container(cfg)
        assert isinstance(content, dict)
        trust.check({str(key): value for key, value in content.items()}, path)
        as_it_was(cfg.get("dataset"))
        return cfg

    def config_to_resume(self) -> DictConfig:
        """What the run goes on with: its configuration, and the labels that it has used."""
        cfg = self.config()
        if self.labels.is_file():
            cfg.datamodule.labels = {"split": str(self.labels)}
        return cfg

    def write_config(self, cfg: DictConfig) -> None:
        write_text(self.path / "config.yaml", _resolved_text(cfg))

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add an epoch to metrics.csv; new columns widen the table, an epoch already there is replaced."""
        rows = [old for old in self.read_metrics() if int(old["epoch"]) < int(str(row["epoch"]))]
        rows.append({key: "" if value is None else str(value) for key, value in row.items()})
        columns: list[str] = []
        for one in rows:
            columns.extend(key for key in one if key not in columns)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics, text.getvalue())

    def read_metrics(self) -> list[dict[str, str]]:
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.is_file() else {}


def run_or_exported(run: str | None, weights: str | None) -> RunFolder | None:
    """The run that a command is about; None where it is about an exported backbone.

    Raises:
        UserError: neither or both are given, or there is no such run.
    """
    if (run is None) == (weights is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (weights=DIR).", status=USAGE)
    return None if run is None else RunFolder.open(run)


def _resolved_text(cfg: DictConfig) -> str:
    """
    Raises:
        UserError: a value refers to one that is not there.
    """
    try:
        of_run = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "trust"])  # whom to trust is no setting
        return OmegaConf.to_yaml(of_run, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration is not complete ({' '.join(str(error).split())}).", status=USAGE) from None


def _made_by_the_first(runs: Path, name: str | None) -> Path:
    if made := os.environ.get(RUN_VARIABLE):
        return Path(made)
    if name is None:
        raise UserError("processes that a launcher starts side by side need a common folder: give name=NAME.")
    return runs / str(name)


def _is_beginning(path: Path) -> bool:
    """Whether a folder holds no more than a run that was killed before it had its configuration."""
    checkpoints = path / "checkpoints"
    left = [one for one in path.iterdir() if one != checkpoints and not one.name.startswith(".config.yaml.")]
    return not left and not (checkpoints.exists() and any(checkpoints.iterdir()))


def _claim(runs: Path, name: str | None, stem: str) -> Path:
    if name not in (None, ""):
        path = runs / str(name)
        if (path / "config.yaml").exists():
            raise UserError(f"run '{path}' exists already; give another name=, or go on with it: resume={path}.")
        path.mkdir(exist_ok=True)
        if not _is_beginning(path):  # what is not ours must neither be mixed up with a run nor go with one
            raise UserError(f"'{path}' exists already and is no run; give another name=.")
        return path
    number = 1
    while True:  # mkdir decides between two runs that start together
        path = runs / f"{stem}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
