"""`selfsight pretrain`: data, network, method, training, measurement, export."""

from __future__ import annotations

from lightning import seed_everything
from omegaconf import DictConfig
from rich.markup import escape

from selfsight.engine import advice, build, measure
from selfsight.engine.measure import Pair
from selfsight.engine.outcome import Outcome, outcome
from selfsight.engine.session import Session, reopen
from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes.dims import at_dims
from selfsight.jobs import pipeline
from selfsight.reporting import report, trackers
from selfsight.reporting.classification import show_classifiers
from selfsight.reporting.tables import show_run
from selfsight.runs.console import clock_text


def run(cfg: DictConfig) -> Outcome:
    """One run, from data to report. What can be refused is refused before the run folder is made.

    Returns:
        Its headline figures; none on the processes that only train.
    """
    cfg, folder = reopen(cfg)
    cfg = build.sized(cfg)
    follows = "then" in cfg or cfg.get("batches") is not None  # further jobs, or stages
    if folder is not None and folder.summary.is_file() and follows:  # the first of its jobs is done
        return pipeline.follow(cfg, folder)
    parts = build.parts(cfg, folder)
    pipeline.check(cfg, parts.datamodule)
    names = parts.description
    session = Session.begin("pretrain", cfg, parts, folder, stem=f"{names.method}-{names.dataset}")
    if not session.fit():
        return Outcome({})
    summary = conclude(session)
    return pipeline.follow(cfg, session.folder) if follows else outcome(session.folder, summary)


def conclude(session: Session) -> Figures:
    """Export the backbone, measure it beside pixels and an untrained twin, write summary and report."""
    parts, console, data = session.parts, session.console, session.parts.datamodule
    session.export_backbone()
    run = session.loaded()
    wanted = parts.final or parts.run.report or trackers.show_features(session.loggers)
    trained = measure.features(run.backbone, data) if wanted else None
    rows = beside_untrained(session, trained) if parts.final else {}
    protocols = measure.protocols(parts.final, data, rows.get("pretrained"))
    if parts.final:
        show_run(console, rows, protocols)
        if parts.plan is not None and (sentence := advice.look_back(rows, parts.plan, parts.recipe.lr)):
            console.print(f"[yellow]warning[/yellow] {escape(sentence)}")
    classifiers = measure.classifiers(parts.method, data, session.folder)
    show_classifiers(console, classifiers)
    knn = rows.get("pretrained", {}).get("knn_top1")
    if sentence := advice.one_class(classifiers, data.data.classes, knn, parts.recipe.lr):
        console.print(f"[yellow]warning[/yellow] {escape(sentence)}")
    summary: Figures = {
        **rows,
        "classifiers": classifiers,
        "classes": list(data.data.classes),
        "train_seconds": session.seconds,
        "protocols": protocols,
    }
    session.folder.write_summary(summary)
    console.print(f"trained in {clock_text(session.seconds)}; backbone: {session.folder.path / 'backbone.safetensors'}")
    if parts.run.report and trained is not None:
        console.print(f"report: {report.write(run, *trained)}")
    shown = None
    if trained is not None:
        shown = ("train", trained[0]) if trained[1] is None else ("test", trained[1])
    trackers.conclude(session.loggers, run, rows.get("pretrained", {}), session.steps, shown)
    return summary


def beside_untrained(session: Session, trained: Pair | None) -> dict[str, Figures]:
    """The figures of raw pixels, of the network as it began, and of the trained one with its features ``trained``."""
    parts, data, method = session.parts, session.parts.datamodule, session.parts.method
    seed_everything(parts.run.seed, workers=True, verbose=False)
    networks = {"pixels": measure.Pixels(), "untrained": parts.untrained().to(method.device)}
    pairs = {name: measure.features(network, data) for name, network in networks.items()}
    assert trained is not None, "there are evaluators, and features for them"
    networks, pairs = networks | {"pretrained": method.measured}, pairs | {"pretrained": trained}
    evaluators = measure.select_evaluators(parts.final, data)
    of_pixels = {name: at_dims(one, None, instead=True) for name, one in evaluators.items()}  # which have no order
    rows = {
        name: measure.run_evaluators(of_pixels if name == "pixels" else evaluators, networks[name], data, pair)
        for name, pair in pairs.items()
    }
    largest = measure.always_largest(*trained)
    measured = {key: value for key, value in largest.items() if key in rows["pretrained"]}
    return {"largest": measured, **rows} if measured else rows
