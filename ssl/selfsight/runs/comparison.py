"""The folder of a comparison: its configuration, and its rows in a table on disk."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from selfsight.errors import UserError
from selfsight.files import write_text
from selfsight.runs import records
from selfsight.runs.folder import RunFolder

TABLE = "comparison.csv"
COLUMNS = ("approach", "labels_per_class", "seed", "accuracy")
OF_FIGURES = ("approach", "figure", "seed", "value")
#: approach, labels a class or the name of a figure, seed, value
Row = tuple[str, int | str, int, float]
#: keys in which the same command may differ from the one that began the comparison: they only add rows
GROWING = ("seeds", "labels_per_class", "approaches", "name", "runs", "workers", "job")


def opened(cfg: DictConfig) -> RunFolder:
    """The comparison's folder, made now or found as the same command has left it.

    Raises:
        UserError: it holds a comparison with other settings.
    """
    path = Path(cfg.runs).expanduser() / str(cfg.name or f"compare-{records.data_name(cfg.dataset)}")
    folder = RunFolder(path)
    if (path / "config.yaml").is_file():
        old, new = folder.config(), OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
        assert isinstance(new, DictConfig)
        other = [str(key) for key in {*old, *new} if key not in GROWING and old.get(key) != new.get(key)]
        if other:
            raise UserError(f"'{path}' holds a comparison with another {min(other)}; give this one a name: name=NAME.")
    elif path.is_dir() and any(path.iterdir()):
        raise UserError(f"'{path}' exists already and is no comparison; give this one another name: name=NAME.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{path}' cannot be made ({error.strerror}); name a folder you may write: runs=DIR.") from None
    folder.write_config(cfg)
    return folder


def drop_unused(folder: RunFolder) -> None:
    """Remove the folder of a comparison that was refused before any of its runs had a checkpoint."""
    if not (folder.path / TABLE).exists() and not any(folder.path.glob("runs/*/checkpoints/*.ckpt")):
        shutil.rmtree(folder.path, ignore_errors=True)


def read(path: Path) -> list[Row]:
    """The rows of a comparison that are finished."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    kind = str if tuple(header) == OF_FIGURES else int
    return [(name, kind(column), int(seed), float(value)) for name, column, seed, value in rows]


def write(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=os.linesep)
    writer.writerow(OF_FIGURES if any(isinstance(row[1], str) for row in rows) else COLUMNS)
    writer.writerows((*row[:3], f"{row[3]:.6f}") for row in rows)
    write_text(path, text.getvalue())
