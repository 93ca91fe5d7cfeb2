"""`selfsight embed`: the features of every image, in one file."""

from __future__ import annotations

from omegaconf import DictConfig

from selfsight.engine import measure
from selfsight.engine.reload import feature_cache, head_of
from selfsight.engine.subject import subject
from selfsight.files import place_to_write, with_folder
from selfsight.reporting import feature_files
from selfsight.runs.console import make_console


def run(cfg: DictConfig) -> None:
    """Write ``train_x [N, D]``, ``train_indices``, ``train_names`` and ``train_labels`` as a NumPy archive.

    And the same of ``test`` and ``unlabelled``, where the data set has these parts. An index is an image's position in
    its part, a name its path below the root of the data set; what has no labels has no array of them; several labels or
    numbers of each image are in ``train_targets [N, T]``. A file called
    ``.parquet`` gets a table with a row for each image instead, see `feature_files.rows_of`.
    """
    feature_files.check(cfg.out, cfg.projection)
    backbone, data, folder, _ = subject(cfg)
    in_run = None if folder is None else folder.path / "features.npz"
    out = with_folder(place_to_write(cfg.out or None, in_run, "the features go: out=features.npz"))
    stage, head, cache = cfg.stage, head_of(cfg.stage, folder, backbone), feature_cache(folder, cfg.cache)
    parts = {
        part: measure.part_features(backbone, data, part, [stage], head=head, cache=cache)[stage]
        for part in measure.available_splits(data)
    }
    feature_files.write(out, data.data, parts, cfg.projection)
    counts = " + ".join(f"{len(features):,} {part}" for part, features in parts.items())
    make_console().print(f"{counts} images, {parts['train'].x.shape[1]} dimensions: {out}")
