"""`selfsight embed`: the features of every image, in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from selfsight.errors import UserError
from selfsight.jobs import measure
from selfsight.jobs.console import make_console, quiet
from selfsight.jobs.evaluate import subject


def run(cfg: DictConfig) -> None:
    """Write ``train_x [N, D]``, ``train_labels``, ``train_indices`` and the same of ``test`` as a NumPy archive."""
    quiet()
    backbone, data, folder = subject(cfg)
    if cfg.out is None and folder is None:
        raise UserError("say where the features go: out=features.npz.", status=2)
    out = Path(cfg.out) if cfg.out is not None else folder.path / "features.npz"  # type: ignore[union-attr]
    arrays = {}
    for split, features in zip(("train", "test"), measure.features(backbone, data, cfg.stage), strict=True):
        arrays[f"{split}_x"] = features.x.numpy()
        arrays[f"{split}_indices"] = features.indices.numpy()
        if features.labels is not None:
            arrays[f"{split}_labels"] = features.labels.numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.npz")
    np.savez(beside, **arrays)
    beside.replace(out)
    train, test = arrays["train_x"], arrays["test_x"]
    make_console().print(f"{len(train)} + {len(test)} images, {train.shape[1]} dimensions: {out}")
