"""`selfsight knn`, `selfsight linear` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import selfsight
from selfsight.errors import UserError
from selfsight.jobs import build, measure
from selfsight.jobs.console import make_console, quiet
from selfsight.jobs.run_folder import RunFolder, write_atomically


def run(cfg: DictConfig) -> None:
    """Extract features once, evaluate, show the numbers with their protocol, keep them in ``eval/<name>.json``."""
    quiet()
    console = make_console()
    evaluator = build.build(cfg.evaluator)
    backbone, data, folder = subject(cfg)
    if hasattr(evaluator, "on_images"):  # needs more than features: augmented images, maps
        result = evaluator.on_images(backbone, data)
    else:
        result = evaluator(*measure.features(backbone, data, cfg.stage))
    show(console, result, evaluator.protocol)
    if folder is not None:
        name = str(cfg.evaluator._target_).rsplit(".", 1)[-1].lower()
        record = {
            "protocol": evaluator.protocol,
            "stage": cfg.stage,
            "data": measure.describe(data.data),
            "result": result,
        }
        path = folder.path / "eval" / f"{name}{'' if cfg.stage == 'final' else '-' + cfg.stage}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(record, indent=2) + "\n")
        console.print(f"kept in {path}")


def subject(cfg: DictConfig) -> tuple[nn.Module, Any, RunFolder | None]:
    """The backbone, its data and its run folder: from ``run``, or from ``backbone`` and a ``dataset``.

    Raises:
        UserError: neither or both are given, or a backbone comes without a data set.
    """
    if (cfg.run is None) == (cfg.backbone is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (backbone=DIR).", status=2)
    folder = RunFolder.open(cfg.run) if cfg.run is not None else None
    dataset = cfg.get("dataset")
    if dataset is None:
        if folder is None:
            raise UserError("an exported backbone carries no images; add dataset=NAME.", status=2)
        dataset = folder.config().dataset
    where = build.device(cfg.accelerator)
    backbone = selfsight.load(folder.path if folder is not None else cfg.backbone).to(where)
    spec: Any = backbone.spec
    view = build.library("datamodules.views").View(dataset.image_size, mean=spec["mean"], std=spec["std"])
    data = build.library("datamodules").ImageDataModule(
        build.build(dataset),
        [view],
        batch_size=1,
        eval_batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        engine="auto",
        seed=0,
        device=where,
    )
    return backbone, data, folder


def show(console: Console, result: dict[str, Any], protocol: str) -> None:
    table = Table("", "value", show_header=False)
    for name, value in result.items():
        if isinstance(value, dict):
            for key, sub in value.items():
                text = f"{sub['mean']:.4f} ± {sub['std']:.4f}" if isinstance(sub, dict) else str(sub)
                table.add_row(f"{name} {key}", text)
        else:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(protocol, style="dim")
