"""`selfsight knn`, `linear`, `retrieval` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

import dataclasses

from omegaconf import DictConfig

from selfsight.engine import build, measure
from selfsight.engine.reload import ALL, feature_cache, head_of
from selfsight.engine.subject import Subject, subject
from selfsight.engine.titles import published, settings_of, title, transfer
from selfsight.errors import UserError
from selfsight.evaluation import base
from selfsight.evaluation.base import Evaluator, Figures
from selfsight.evaluation.features import FINAL, PROJECTION, stage_names
from selfsight.evaluation.published import PublishedProbe
from selfsight.reporting.tables import show_figures, show_stages
from selfsight.runs import records
from selfsight.runs.console import make_console
from selfsight.runs.environment import command
from selfsight.runs.records import note_in_metrics


def run(cfg: DictConfig) -> Figures:
    """Extract features once, evaluate, show the numbers with their protocol, keep them in ``eval/<name>.json``."""
    console = make_console()
    evaluator = evaluator_of(cfg)
    of = subject(cfg)
    results = evaluate(evaluator, of, str(cfg.stage), cache=bool(cfg.cache))
    if len(results) > 1:
        show_stages(console, results)
    else:
        show_figures(console, results[cfg.stage])
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
