"""`selfsight knn`, `linear`, `retrieval` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import selfsight
from selfsight.composition.defaults import differences, stated
from selfsight.datamodules import ImageDataModule
from selfsight.engine import build, measure
from selfsight.engine.devices import device
from selfsight.engine.inherit import chosen_or_inherited, names_something
from selfsight.engine.reload import ALL, eval_datamodule, feature_cache, head_of
from selfsight.errors import UserError
from selfsight.evaluation import base
from selfsight.evaluation.base import Evaluator, Figures
from selfsight.evaluation.features import FINAL, PROJECTION, stage_names
from selfsight.evaluation.probes import diagnostics
from selfsight.evaluation.published import PublishedProbe
from selfsight.runs import records
from selfsight.runs.console import make_console, make_table
from selfsight.runs.environment import command
from selfsight.runs.folder import RunFolder

CACHED = "cached"  # the linear protocol that needs no augmentation


class Subject(NamedTuple):
    """A frozen backbone, its images, its run, and the data set that was given in place of the run's own."""

    backbone: nn.Module
    data: ImageDataModule
    folder: RunFolder | None
    dataset: DictConfig | None


def run(cfg: DictConfig) -> Figures:
    """Extract features once, evaluate, show the numbers with their protocol, keep them in ``eval/<name>.json``."""
    console = make_console()
    evaluator = evaluator_of(cfg)
    of = subject(cfg)
    results = evaluate(evaluator, of, str(cfg.stage), cache=bool(cfg.cache))
    if len(results) > 1:
        show_stages(console, results)
    else:
        show(console, results[cfg.stage])
    result = results if len(results) > 1 else next(iter(results.values()))
    protocol = base.protocol(evaluator, result) + transfer(of, evaluator)
    console.print(protocol, style="dim")
    if of.folder is not None:
        settings = settings_of(cfg, of.dataset)
        path = records.free_path(of.folder.path / records.FOLDER, title(cfg, of.dataset, evaluator), settings)
        record = {
            "protocol": protocol,
            "command": command(),
            "stage": cfg.stage,
            "data": measure.describe(of.data.data),
            "settings": settings,
            "result": result,
        }
        records.write(path, record)
        note_in_metrics(of.folder, path.stem, result)
        console.print(f"kept in {path}")
    return result


def evaluator_of(cfg: DictConfig) -> Evaluator:
    """The evaluator configured; ``linear.protocol`` names a published linear evaluation in its place."""
    if (linear := published(cfg)) is None:
        return build.evaluator(cfg.evaluator)
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


def transfer(of: Subject, evaluator: Evaluator) -> str:
    """What the protocol adds where a data set is given; probes with masks name theirs themselves."""
    if of.dataset is None or own_images(evaluator):
        return ""
    spec: Any = of.backbone.spec
    source = f", pretrained on {spec['dataset']}" if "dataset" in spec else ""
    return f"; on {dataset_name(of.dataset)} at {of.dataset.image_size} px{source}"


def own_images(evaluator: Evaluator) -> str:
    """The name of the images, with masks, that an evaluator brings itself; empty where it brings none."""
    return str(getattr(getattr(evaluator, "data", None), "name", ""))


def dataset_name(dataset: DictConfig) -> str:
    """``cifar10``; folders of images by the name of the folder: ``folder-flowers``."""
    name, root = records.data_name(dataset), dataset.get("root")
    own = name == "folder" and root is not None
    return f"folder-{Path(root).expanduser().resolve().name}" if own else name


def title(cfg: DictConfig, dataset: DictConfig | None, evaluator: Evaluator) -> str:
    """Name of the record: evaluator, and what differs from the run's own data, the last stage and the usual values."""
    if (linear := published(cfg)) is not None:
        changed = {str(key): value for key, value in linear.items() if key != "protocol" and value is not None}
        words = ["linear", str(linear.protocol), *records.changed_slug(changed)]
    else:
        words = slug(cfg, "evaluator", cfg.evaluator)
    if own_images(evaluator):
        words.insert(1, own_images(evaluator))
    elif dataset is not None:
        words += [dataset_name(dataset), *slug(cfg, "dataset", dataset)[1:]]
    if cfg.stage != FINAL:
        words.append(cfg.stage)
    return records.joined(words)


def slug(cfg: DictConfig, group: str, node: DictConfig) -> list[str]:
    """Words for the name of a record: the choice of a group, and what differs from it."""
    choice, changed = differences(group, str(cfg.choices.get(group) or node.get("name")), node)
    return [choice, *records.changed_slug(changed)]


def settings_of(cfg: DictConfig, dataset: DictConfig | None) -> dict[str, object]:
    """All that two records of one name may differ in."""
    how = (
        {"evaluator": records.to_json(stated(cfg.evaluator))}
        if published(cfg) is None
        else {"linear": records.to_json(cfg.linear)}
    )
    return {**how, "stage": str(cfg.stage), "dataset": records.to_json(None if dataset is None else stated(dataset))}


def evaluate(evaluator: Evaluator, of: Subject, stage: str, *, cache: bool) -> dict[str, Figures]:
    """Results by stage: of the one asked for, or of every one (``stage=all``) from a single pass over the images."""
    backbone, data, folder, _ = of
    measure.check_labels(evaluator, data)
    head = head_of(stage, folder, backbone)
    if base.looks_at_images(evaluator):  # needs more than features: augmented images, maps
        if stage == ALL:
            raise UserError(f"{type(evaluator).__name__} looks at one stage at a time; give stage=NAME.", status=2)
        if stage != FINAL and not hasattr(evaluator, "stage") and not hasattr(evaluator, "stages"):
            raise UserError(f"{type(evaluator).__name__} looks at the last stage alone; leave stage out.", status=2)
        if hasattr(evaluator, "head"):
            evaluator = dataclasses.replace(evaluator, head=head)  # type: ignore[type-var]
        return {stage: evaluator.on_images(backbone, data)}
    stages = [stage]
    if stage == ALL:
        stages = [*stage_names(backbone), *([PROJECTION] if head else [])]
    pairs = measure.staged_features(backbone, data, stages, head=head, cache=feature_cache(folder, cache))
    return {stage: measure.run_evaluator(evaluator, *pair) for stage, pair in pairs.items()}


def subject(cfg: DictConfig) -> Subject:
    """What is measured, on which images: from ``run``, or from ``weights`` and a ``dataset``.

    Values of ``dataset`` alone are those of the run's data set with these in their place.

    Raises:
        UserError: neither or both are given, or a backbone comes without a data set.
    """
    if (cfg.run is None) == (cfg.weights is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (weights=DIR).", status=2)
    folder = RunFolder.open(cfg.run) if cfg.run is not None else None
    given = cfg.get("dataset")
    if folder is None and not names_something(given):
        raise UserError("an exported backbone carries no images; add dataset=NAME.", status=2)
    of_run = given if folder is None else folder.config().dataset
    dataset = of_run if given is None else chosen_or_inherited(given, of_run)
    backbone = selfsight.load(folder.path if folder is not None else cfg.weights).to(device(cfg.accelerator))
    images = build.build(dataset)
    images = images if folder is None else build.as_of_run(images, dataset, folder)
    data = eval_datamodule(images, backbone, cfg.batch_size, cfg.num_workers)
    return Subject(backbone, data, folder, dataset if given is not None else None)


def note_in_metrics(folder: RunFolder, name: str, result: Figures) -> None:
    """Single numbers of an evaluation, as columns of the last epoch in metrics.csv."""
    rows = folder.read_metrics()
    numbers = {f"{name}/{key}": f"{value:.6g}" for key, value in result.items() if isinstance(value, float)}
    if rows and numbers:
        folder.append_metrics({**rows[-1], **numbers})


def show(console: Console, result: Figures) -> None:
    """A table of the figures; beside those that have one, what is normal. The alarm, where one rings."""
    table = Table(show_header=False, box=None)
    for name, value in records.figures(result).items():
        normal = [diagnostics.FIGURES[name].normal] if name in diagnostics.FIGURES else []
        table.add_row(name, records.number(value), *normal)
    console.print(table)
    alarm = diagnostics.judge({name: value for name, value in result.items() if isinstance(value, float)})
    if alarm:
        console.print(f"[yellow]warning[/yellow] {alarm}")


def show_stages(console: Console, results: Mapping[str, Figures]) -> None:
    """A row for each stage; the kNN of every k is left out."""
    rows = {stage: records.figures(result) for stage, result in results.items()}
    names = [name for name in next(iter(rows.values())) if not name.startswith("knn_k")]
    table = make_table("stage", *names)
    for stage, row in rows.items():
        table.add_row(stage, *(records.number(row[name]) for name in names))
    console.print(table)
