"""`selfsight knn`, `linear`, `retrieval` and their like: one evaluator on the frozen backbone of a run."""

from __future__ import annotations

from omegaconf import DictConfig

from selfsight.engine import build
from selfsight.engine.about_data import describe
from selfsight.engine.reload import ALL
from selfsight.engine.subject import Subject, evaluate, subject
from selfsight.engine.titles import own_images, published, settings_of, title, transfer
from selfsight.evaluation import base
from selfsight.evaluation.base import Evaluator, Figures
from selfsight.evaluation.features import FINAL
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
    if not own_images(evaluator):
        console.print(images_of(of), style="dim", markup=False, highlight=False)
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
            "data": describe(of.data.data),
            "settings": settings,
            "result": result,
        }
        records.write(path, record)
        note_in_metrics(of.folder, path.stem, result)
        console.print(f"kept in {path}")
    return result


def images_of(of: Subject) -> str:
    """On how many images a backbone is judged, and whether its run, a try, has seen a part of them alone."""
    data = of.data.data
    limit = None if of.folder is None else of.folder.config().get("limit_images")
    tests = f", {len(data.test):,} test images" if data.test is not None and data.held_out else ""
    seen = f"; the run learned from {limit:,} of them (limit_images)" if limit and of.dataset is None else ""
    return f"{describe(data)}{tests}{seen}"


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
