"""`selfsight embed`: the features of every image, in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from selfsight.engine import measure
from selfsight.engine.reload import feature_cache, head_of
from selfsight.errors import UserError
from selfsight.files import replace
from selfsight.jobs.evaluate import subject
from selfsight.runs.console import make_console, quiet
from selfsight.runs.records import with_folder


def run(cfg: DictConfig) -> None:
    """Write ``train_x [N, D]``, ``train_indices``, ``train_names`` and ``train_labels`` as a NumPy archive.

    And the same of ``test`` and ``unlabelled``, where the data set has these parts. An index is an image's position in
    its part, a name its path below the root of the data set; what has no labels has no array of them.
    """
    quiet()
    backbone, data, folder, _ = subject(cfg)
    if cfg.out is None and folder is None:
        raise UserError("say where the features go: out=features.npz.", status=2)
    out = with_folder(Path(cfg.out).expanduser() if folder is None or cfg.out else folder.path / "features.npz")
    stage, head, cache = cfg.stage, head_of(cfg.stage, folder, backbone), feature_cache(folder, cfg.cache)
    arrays: dict[str, np.ndarray] = {}
    for part in measure.available_splits(data):
        features = measure.part_features(backbone, data, part, [stage], head=head, cache=cache)[stage]
        images = data.data.split(part)
        arrays[f"{part}_x"] = features.x.numpy()
        arrays[f"{part}_indices"] = features.indices.numpy()
        arrays[f"{part}_names"] = np.array([images.name(int(i)) for i in features.indices], dtype=np.str_)
        if features.labels is not None:
            arrays[f"{part}_labels"] = features.labels.numpy()
    replace(out, lambda beside: save(beside, arrays))
    counts = " + ".join(f"{len(arrays[f'{part}_x']):,} {part}" for part in measure.available_splits(data))
    make_console().print(f"{counts} images, {arrays['train_x'].shape[1]} dimensions: {out}")


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, NumPy would change its ending
        np.savez(file, **arrays)  # type: ignore[arg-type]
