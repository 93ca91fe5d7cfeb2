"""The folder of a run: everything a run writes, and nothing outside it."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.errors import UserError

#: tells the other processes of a run which folder the first one made
RUN_VARIABLE = "SELFSIGHT_RUN_FOLDER"

REPORTED_PACKAGES = (
    "selfsight",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "hydra-core",
    "numpy",
    "faiss-cpu",
    "scikit-learn",
)


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target and move over it, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


def command() -> list[str]:
    """The words that started this process, as a user types them."""
    return ["selfsight", *sys.argv[1:]]


def environment() -> dict[str, Any]:
    """What has to be known to run the same thing again: command, versions, machine, commit."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def commit() -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(
                ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None

    return {
        "command": command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "packages": {package: version(package) for package in REPORTED_PACKAGES},
    }


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoints" / "last.ckpt"
        self.metrics = path / "metrics.csv"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.labels = path / "labels.json"

    @classmethod
    def create(cls, cfg: DictConfig, stem: str) -> RunFolder:
        """Make ``<runs>/<name>`` (``<runs>/<stem>-<number>`` without a name), configuration and environment in it.

        Raises:
            UserError: the folder exists already, or cannot be written.
        """
        runs = Path(cfg.runs).expanduser()
        if not on_first_process():
            return cls(_made_by_the_first(runs, cfg.name))
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path = _claim(runs, cfg.name, stem)
            (path / "checkpoints").mkdir()
        except (PermissionError, NotADirectoryError, FileExistsError, OSError) as error:
            raise UserError(
                f"the run folder cannot be made in '{runs}' ({error.strerror}); name a folder you may write: runs=DIR."
            ) from None
        os.environ[RUN_VARIABLE] = str(path.resolve())
        folder = cls(path)
        folder.write_config(cfg)
        write_atomically(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. ``last`` is the newest one in ``runs/``.

        Raises:
            UserError: there is no run at ``path``.
        """
        folder = Path(path).expanduser()
        if str(path) == "last":
            made = sorted(Path("runs").glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
            if not made:
                raise UserError("there is no run in 'runs/' yet; `selfsight pretrain` makes one.")
            folder = made[-1].parent
        if not (folder / "config.yaml").is_file():
            from selfsight.errors import nearest

            beside = [str(p.parent) for p in folder.parent.glob("*/config.yaml")] if folder.parent.is_dir() else []
            raise UserError(f"'{folder}' is no run folder (it has no config.yaml).{nearest(str(folder), beside)}")
        return cls(folder)

    def drop_unused(self) -> None:
        """Remove the folder of a run that was refused before its first epoch ended."""
        if not self.checkpoint.exists() and not self.metrics.exists():
            shutil.rmtree(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def config(self) -> DictConfig:
        cfg = OmegaConf.load(self.path / "config.yaml")
        assert isinstance(cfg, DictConfig)
        return cfg

    def write_config(self, cfg: DictConfig) -> None:
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add an epoch to metrics.csv; new columns widen the table, an epoch already there is replaced."""
        rows = [old for old in self.read_metrics() if int(old["epoch"]) < int(row["epoch"])]
        rows.append({key: "" if value is None else str(value) for key, value in row.items()})
        columns: list[str] = []
        for one in rows:
            columns.extend(key for key in one if key not in columns)
        beside = self.metrics.with_name(f".{self.metrics.name}.{os.getpid()}")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.metrics)

    def read_metrics(self) -> list[dict[str, str]]:
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="") as file:
            return list(csv.DictReader(file))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text()) if self.summary.is_file() else {}


def on_first_process() -> bool:
    """Whether this is the process that speaks and writes, told from what launchers set."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))


def _made_by_the_first(runs: Path, name: str | None) -> Path:
    if made := os.environ.get(RUN_VARIABLE):
        return Path(made)
    if name is None:
        raise UserError("processes that a launcher starts side by side need a common folder: give name=NAME.")
    return runs / str(name)


def _claim(runs: Path, name: str | None, stem: str) -> Path:
    if name not in (None, ""):
        path = runs / str(name)
        if (path / "config.yaml").exists():
            raise UserError(f"run '{path}' exists already; give another name=, or go on with it: resume={path}.")
        path.mkdir(parents=True, exist_ok=True)
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
