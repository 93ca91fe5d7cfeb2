"""`selfsight knn`, `linear`, `retrieval` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

import selfsight
from selfsight.checkpoints.load import described
from selfsight.datamodules import ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.engine import build, measure
from selfsight.engine.checkpointing import read_checkpoint
from selfsight.errors import UserError
from selfsight.evaluation.features import stage_names
from selfsight.evaluation.probes import diagnostics
from selfsight.evaluation.published import PublishedProbe
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.runs import records
from selfsight.runs.console import make_console, make_table, quiet
from selfsight.runs.folder import RunFolder, command

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
        settings = settings_of(cfg)
        path = records.free_path(folder.path / records.FOLDER, title(cfg, evaluator), settings)
        record = {
            "protocol": protocol,
            "command": command(),
            "stage": cfg.stage,
            "data": measure.describe(data.data),
            "settings": settings,
            "result": results if len(results) > 1 else next(iter(results.values())),
        }
        records.write(path, record)
        note_in_metrics(folder, path.stem, record["result"])
        console.print(f"kept in {path}")


def evaluator_of(cfg: DictConfig) -> Any:
    """The evaluator configured; ``linear.protocol`` names a published linear evaluation in its place."""
    if (linear := published(cfg)) is None:
        return build.build(cfg.evaluator)
    return PublishedProbe(
        linear.protocol,
        (FINAL,) if cfg.stage == ALL else (cfg.stage,),
        linear.epochs,
        linear.batch_size,
        linear.lr,
        linear.first_per_class,
    )


def published(cfg: DictConfig) -> DictConfig | None:
    """The settings of a published linear evaluation, where one is asked for."""
    linear: DictConfig | None = cfg.get("linear")
    return None if linear is None or linear.protocol == CACHED else linear


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
    return f"folder-{Path(dataset.root).expanduser().resolve().name}" if own else str(dataset.name)


def title(cfg: DictConfig, evaluator: Any) -> str:
    """Name of the record: evaluator, and what differs from the run's own data, the last stage and the usual values."""
    if (linear := published(cfg)) is not None:
        changed = {str(key): value for key, value in linear.items() if key != "protocol" and value is not None}
        words = ["linear", str(linear.protocol), *records.told(changed)]
    else:
        words = records.named_after("evaluator", cfg.evaluator)
    if hasattr(evaluator, "data"):  # images with masks
        words.insert(1, evaluator.data.name)
    elif cfg.get("dataset") is not None:
        words += [dataset_name(cfg.dataset), *records.named_after("dataset", cfg.dataset)[1:]]
    if cfg.stage != FINAL:
        words.append(cfg.stage)
    return records.joined(words)


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """All that two records of one name may differ in."""
    how = (
        {"evaluator": records.plain(cfg.evaluator)} if published(cfg) is None else {"linear": records.plain(cfg.linear)}
    )
    return {**how, "stage": str(cfg.stage), "dataset": records.plain(cfg.get("dataset"))}


def evaluate(
    cfg: DictConfig, evaluator: Any, backbone: nn.Module, data: Any, folder: RunFolder | None
) -> dict[str, Result]:
    """Results by stage: of the one asked for, or of every one (``stage=all``) from a single pass over the images."""
    measure.check_labels(evaluator, data)
    head = head_of(cfg.stage, folder, backbone)
    if hasattr(evaluator, "on_images"):  # needs more than features: augmented images, maps
        if cfg.stage == ALL:
            raise UserError(f"{type(evaluator).__name__} looks at one stage at a time; give stage=NAME.", status=2)
        if cfg.stage != FINAL and not hasattr(evaluator, "stage") and not hasattr(evaluator, "stages"):
            raise UserError(f"{type(evaluator).__name__} looks at the last stage alone; leave stage out.", status=2)
        if hasattr(evaluator, "head"):
            evaluator = dataclasses.replace(evaluator, head=head)
        return {cfg.stage: evaluator.on_images(backbone, data)}
    stages = [cfg.stage]
    if cfg.stage == ALL:
        stages = [*stage_names(backbone), *([PROJECTION] if head else [])]
    pairs = measure.staged_features(backbone, data, stages, head=head, cache=cache_of(cfg, folder))
    return {stage: measure.measured(evaluator, *pair) for stage, pair in pairs.items()}


def subject(cfg: DictConfig) -> tuple[nn.Module, Any, RunFolder | None]:
    """The backbone, its data and its run folder: from ``run``, or from ``backbone`` and a ``dataset``.

    Values of ``dataset`` alone are those of the run's data set with these in their place, and stand in ``cfg`` so.

    Raises:
        UserError: neither or both are given, or a backbone comes without a data set.
    """
    from selfsight.jobs.finetune import chosen, names

    if (cfg.run is None) == (cfg.backbone is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (backbone=DIR).", status=2)
    folder = RunFolder.open(cfg.run) if cfg.run is not None else None
    dataset = cfg.get("dataset")
    if folder is None and not names(dataset):
        raise UserError("an exported backbone carries no images; add dataset=NAME.", status=2)
    if folder is not None:
        of_run = folder.config().dataset
        if dataset is not None:
            OmegaConf.set_struct(cfg, False)
            cfg.dataset = chosen(dataset, of_run)
        dataset = cfg.get("dataset") or of_run
    where = build.device(cfg.accelerator)
    backbone = selfsight.load(folder.path if folder is not None else cfg.backbone).to(where)
    images = build.build(dataset)
    images = images if folder is None else build.of_run(images, dataset, folder)
    return backbone, plain_data(images, backbone, cfg.batch_size, cfg.num_workers), folder


def plain_data(images: Any, backbone: nn.Module, batch_size: int = 256, num_workers: int | str = "auto") -> Any:
    """A datamodule of all images of a data set, as evaluation presents them to a backbone, on its device."""
    mean, std = described(backbone, "mean"), described(backbone, "std")
    view = View(images.image_size, mean=mean, std=std)
    return ImageDataModule(
        images,
        [view],
        batch_size=1,
        eval_batch_size=batch_size,
        num_workers=num_workers,
        engine="auto",
        seed=0,
        device=next(backbone.parameters()).device,
    )


def cache_of(cfg: DictConfig, folder: RunFolder | None) -> Path | None:
    """Where features are kept for the next time; None where they are not."""
    return None if folder is None or not cfg.cache else folder.path / "features"


def head_of(stage: str, folder: RunFolder | None, backbone: nn.Module) -> nn.Module | None:
    """The projection head, beside the backbone, for a stage that needs one; for ``all`` the run's, where it has one.

    Raises:
        UserError: ``projection`` is asked for, and there is none.
    """
    head = projector(folder) if folder is not None and stage in (ALL, PROJECTION) else None
    if head is not None:
        head.to(next(backbone.parameters()).device)
    if stage != PROJECTION or head is not None:
        return head
    if folder is None:
        raise UserError("an exported backbone has lost its projector; give its run instead: run=runs/NAME.", status=2)
    method = str(folder.config().method._target_).rpartition(".")[2]
    raise UserError(f"{method}, the method of '{folder.path}', has no projector of features; take another stage.")


def projector(folder: RunFolder) -> nn.Module | None:
    """The projection head of a run with its trained weights; None where its method has none, or one of maps."""
    cfg = folder.config()
    method = trained_method(folder, cfg, build.datamodule(cfg, folder))
    head = getattr(method, "projector", None)
    on_maps = isinstance(head, nn.Module) and any(isinstance(part, nn.Conv2d) for part in head.modules())  # PixPro's
    return head if isinstance(head, nn.Module) and not on_maps else None


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
    table = Table(show_header=False, box=None)
    for name, value in records.figures(result).items():
        normal = [diagnostics.FIGURES[name].normal] if name in diagnostics.FIGURES else []
        table.add_row(name, records.number(value), *normal)
    console.print(table)
    alarm = diagnostics.judge({name: value for name, value in result.items() if isinstance(value, float)})
    if alarm:
        console.print(f"[yellow]warning[/yellow] {alarm}")


def show_stages(console: Console, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each stage; the kNN of every k is left out."""
    rows = {stage: records.figures(result) for stage, result in results.items()}
    names = [name for name in next(iter(rows.values())) if not name.startswith("knn_k")]
    table = make_table("stage", *names)
    for stage, row in rows.items():
        table.add_row(stage, *(records.number(row[name]) for name in names))
    console.print(table)
