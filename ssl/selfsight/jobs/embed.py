"""`selfsight embed`: the features of every image, in one file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from omegaconf import DictConfig

from selfsight.engine import measure
from selfsight.engine.reload import feature_cache, head_of
from selfsight.errors import UserError
from selfsight.files import replace, with_folder
from selfsight.jobs.evaluate import subject
from selfsight.reporting import embedding
from selfsight.reporting.feature_files import arrays_of, rows_of, save, save_table
from selfsight.runs.console import make_console

PARQUET, NUMPY = ".parquet", ".npz"


def run(cfg: DictConfig) -> None:
    """Write ``train_x [N, D]``, ``train_indices``, ``train_names`` and ``train_labels`` as a NumPy archive.

    And the same of ``test`` and ``unlabelled``, where the data set has these parts. An index is an image's position in
    its part, a name its path below the root of the data set; what has no labels has no array of them; several labels or
    numbers of each image are in ``train_targets [N, T]``. A file called
    ``.parquet`` gets a table with a row for each image instead, see `rows_of`.
    """
    check(cfg.out, cfg.projection)
    backbone, data, folder, _ = subject(cfg)
    if cfg.out is None and folder is None:
        raise UserError("say where the features go: out=features.npz.", status=2)
    out = with_folder(Path(cfg.out).expanduser() if folder is None or cfg.out else folder.path / "features.npz")
    stage, head, cache = cfg.stage, head_of(cfg.stage, folder, backbone), feature_cache(folder, cfg.cache)
    parts = {
        part: measure.part_features(backbone, data, part, [stage], head=head, cache=cache)[stage]
        for part in measure.available_splits(data)
    }
    if out.suffix == PARQUET:
        replace(out, lambda beside: save_table(beside, rows_of(data.data, parts, cfg.projection)))
    else:
        replace(out, lambda beside: save(beside, arrays_of(data.data, parts)))
    counts = " + ".join(f"{len(features):,} {part}" for part, features in parts.items())
    make_console().print(f"{counts} images, {parts['train'].x.shape[1]} dimensions: {out}")


def check(out: str | None, projection: str) -> None:
    """Refuse, before anything is computed, what cannot be written.

    Raises:
        UserError: a file of another kind, a table without the package that writes it, or see
            `embedding.check_projection`.
    """
    embedding.check_projection(projection)
    if out is not None and Path(out).suffix not in (NUMPY, PARQUET) and not Path(out).expanduser().is_dir():
        raise UserError(f"out is '{out}'; a file that ends in {NUMPY} (arrays) or {PARQUET} (a table) was expected.")
    if out is not None and str(out).endswith(PARQUET) and importlib.util.find_spec("pyarrow") is None:
        raise UserError("a table needs a package: pip install 'selfsight[parquet]'; out=features.npz does without.")
