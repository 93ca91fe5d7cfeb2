"""`selfsight knn`, `linear`, `retrieval` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import selfsight
from selfsight.errors import UserError
from selfsight.jobs import build, measure
from selfsight.jobs.console import make_console, make_table, quiet
from selfsight.jobs.run_folder import RunFolder, command, write_atomically
from selfsight.jobs.saving import read_checkpoint
from selfsight.nn.simclr_head import ProjectionHead

ALL, FINAL, PROJECTION = "all", "final", "projection"
CACHED = "cached"  # the linear protocol that needs no augmentation

Result = dict[str, Any]


def run(cfg: DictConfig) -> None:
    """Extract features once, evaluate, show the numbers with their protocol, keep them in ``eval/<name>.json``."""
    quiet()
    console = make_console()
    evaluator = evaluator_of(cfg)
    backbone, data, folder = subject(cfg)
    results = evaluate(cfg, evaluator, backbone, data, folder)
    if len(results) > 1:
        show_stages(console, results)
    else:
        show(console, results[cfg.stage])
    protocol = evaluator.protocol + transfer(cfg, evaluator, backbone)
    console.print(protocol, style="dim")
    if folder is not None:
        name = title(cfg, evaluator)
        record = {
            "protocol": protocol,
            "command": command(),
            "stage": cfg.stage,
            "data": measure.describe(data.data),
            "result": results if len(results) > 1 else next(iter(results.values())),
        }
        path = folder.path / "eval" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(record, indent=2) + "\n")
        note_in_metrics(folder, name, record["result"])
        console.print(f"kept in {path}")


def evaluator_of(cfg: DictConfig) -> Any:
    """The evaluator configured; ``linear.protocol`` names a published linear evaluation in its place."""
    linear = cfg.get("linear")
    if linear is None or linear.protocol == CACHED:
        return build.build(cfg.evaluator)
    return build.library("evaluation.published").PublishedProbe(
        linear.protocol,
        (FINAL,) if cfg.stage == ALL else (cfg.stage,),
        linear.epochs,
        linear.batch_size,
        linear.lr,
        linear.first_per_class,
    )


def transfer(cfg: DictConfig, evaluator: Any, backbone: nn.Module) -> str:
    """What the protocol adds where a data set is given; probes with masks name theirs themselves."""
    dataset = cfg.get("dataset")
    if dataset is None or hasattr(evaluator, "data"):
        return ""
    spec: Any = backbone.spec
    source = f", pretrained on {spec['dataset']}" if "dataset" in spec else ""
    return f"; on {dataset_name(dataset)} at {dataset.image_size} px{source}"


def dataset_name(dataset: DictConfig) -> str:
    """``cifar10``; folders of images by the name of the folder: ``folder-flowers``."""
    own = dataset.name == "folder" and dataset.get("root") is not None
    return f"folder-{Path(dataset.root).resolve().name}" if own else str(dataset.name)


def title(cfg: DictConfig, evaluator: Any) -> str:
    """Name of the record: evaluator, and what differs from the run's own data, last stage and default protocol."""
    words = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(evaluator).__name__)  # DenseKNN: Dense_KNN
    parts = [words.lower().removesuffix("_probe")]
    if hasattr(evaluator, "protocol_name"):
        parts = ["linear", evaluator.protocol_name]
    elif getattr(evaluator, "folds", None):
        parts.append("cv")
    if hasattr(evaluator, "data"):  # images with masks
        parts.append(evaluator.data.name)
    elif cfg.get("dataset") is not None:
        parts.append(dataset_name(cfg.dataset))
    if cfg.stage != FINAL:
        parts.append(cfg.stage)
    return "-".join(parts)


def evaluate(
    cfg: DictConfig, evaluator: Any, backbone: nn.Module, data: Any, folder: RunFolder | None
) -> dict[str, Result]:
    """Results by stage: of the one asked for, or of every one (``stage=all``) from a single pass over the images."""
    if hasattr(evaluator, "on_images"):  # needs more than features: augmented images, maps
        if cfg.stage == ALL:
            raise UserError(f"{type(evaluator).__name__} looks at one stage at a time; give stage=NAME.", status=2)
        if cfg.stage != FINAL and not hasattr(evaluator, "stage") and not hasattr(evaluator, "stages"):
            raise UserError(f"{type(evaluator).__name__} looks at the last stage alone; leave stage out.", status=2)
        return {cfg.stage: evaluator.on_images(backbone, data)}
    head = projector(folder) if folder is not None and cfg.stage in (ALL, PROJECTION) else None
    if head is not None:
        head.to(next(backbone.parameters()).device)
    stages = [cfg.stage]
    if cfg.stage == ALL:
        stages = [*build.library("evaluation.features").stage_names(backbone), *([PROJECTION] if head else [])]
    cache = None if folder is None or not cfg.cache else folder.path / "features"
    pairs = measure.staged_features(backbone, data, stages, head=head, cache=cache)
    return {stage: evaluator(*pair) for stage, pair in pairs.items()}


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


def projector(folder: RunFolder) -> nn.Module | None:
    """The projection head of a run with its trained weights; None where its method has none."""
    cfg = folder.config()
    method = trained_method(folder, cfg, build.datamodule(cfg))
    head = getattr(method, "projector", None)
    return head if isinstance(head, nn.Module) else None


def trained_method(folder: RunFolder, cfg: DictConfig, data: Any) -> Any:
    """The method of a run as its last checkpoint has it, on the CPU; of a distilled student without its teacher."""
    state = read_checkpoint(folder.checkpoint)["state_dict"]
    parts: dict[str, Any] = {}
    if "run" in cfg:  # a fine-tuning: it goes on from the head of another run
        parts["projector"] = ProjectionHead.out_of(state, "projector.")
    if "teacher" in cfg:
        parts["teacher"] = nn.Identity()
        state = {name: value for name, value in state.items() if not name.startswith("teacher.")}
    method = build.method(cfg, data, **parts)
    method.load_state_dict(state)
    return method


def note_in_metrics(folder: RunFolder, name: str, result: Mapping[str, Any]) -> None:
    """Single numbers of an evaluation, as columns of the last epoch in metrics.csv."""
    rows = folder.read_metrics()
    numbers = {f"{name}/{key}": f"{value:.6g}" for key, value in result.items() if isinstance(value, float)}
    if rows and numbers:
        folder.append_metrics({**rows[-1], **numbers})


def show(console: Console, result: Mapping[str, Any]) -> None:
    """A table of the figures; beside those that have one, what is normal. The alarm, where one rings."""
    diagnostics = build.library("evaluation.diagnostics")
    table = Table(show_header=False, box=None)
    for name, value in result.items():
        normal = [diagnostics.FIGURES[name].normal] if name in diagnostics.FIGURES else []
        for key, sub in lines(value).items():
            table.add_row(f"{name} {key}".strip(), number(sub), *normal)
    console.print(table)
    alarm = diagnostics.judge({name: value for name, value in result.items() if isinstance(value, float)})
    if alarm:
        console.print(f"[yellow]warning[/yellow] {alarm}")


def show_stages(console: Console, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each stage; of the figures those that are one number, the kNN of every k left out."""
    first = next(iter(results.values()))
    names = [name for name, value in first.items() if isinstance(value, float) and not name.startswith("knn_k")]
    table = make_table("stage", *names)
    for stage, result in results.items():
        table.add_row(stage, *(number(result[name]) for name in names))
    console.print(table)


def lines(value: Any) -> dict[str, Any]:
    """The numbers a figure is made of, by what tells them apart."""
    return value if isinstance(value, dict) and "mean" not in value else {"": value}


def number(value: Any) -> str:
    """As a person reads it; the spread where there is one."""
    if isinstance(value, dict):
        return f"{value['mean']:.4f} ± {value['std']:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
