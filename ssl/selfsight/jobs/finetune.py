"""`selfsight finetune`: a pretrained network, or one from scratch, trained on the images that keep their labels."""

from __future__ import annotations

from omegaconf import DictConfig

from selfsight.engine import build, inherit, measure
from selfsight.engine.checkpointing import training_checkpoint
from selfsight.engine.outcome import Outcome, outcome
from selfsight.engine.reload import projection_head
from selfsight.engine.session import Session, labels_used, reopen
from selfsight.evaluation.base import Figures
from selfsight.reporting import report, trackers
from selfsight.reporting.classification import show_classifiers
from selfsight.runs.console import clock_text
from selfsight.runs.folder import RunFolder


def run(cfg: DictConfig) -> Outcome:
    """Fine-tune, measure, export. The run folder names the run it started from in its configuration."""
    cfg, folder = reopen(cfg)
    if folder is None or not folder.began:
        cfg, backbone, projector = inherit.completed_for_finetuning(cfg, again=folder is not None)
    else:
        backbone, projector = None, projection_head(training_checkpoint(folder.checkpoint)["state_dict"])
    source = None if cfg.run is None else RunFolder.open(cfg.run)
    parts = build.parts(cfg, folder or source, backbone=backbone, projector=projector)
    session = Session.begin("finetune", cfg, parts, folder, stem=f"finetune-{parts.description.dataset}")
    return outcome(session.folder, conclude(session)) if session.fit() else Outcome({})


def conclude(session: Session) -> Figures:
    """Export the backbone, measure the classifiers, write summary and report."""
    folder, data, console = session.folder, session.parts.datamodule, session.console
    session.export_backbone()
    classifiers = measure.classifiers(session.parts.method, data, folder)
    show_classifiers(console, classifiers)
    labels = len(labels_used(data) or ())
    summary = {
        "classifiers": classifiers,
        "classes": list(data.data.classes),
        "labels": labels,
        "train_seconds": session.seconds,
    }
    folder.write_summary(summary)
    kept = folder.classification if classifiers else folder.path / "backbone.safetensors"  # nothing to classify
    console.print(f"{labels} labels, trained in {clock_text(session.seconds)}; {kept}")
    if session.parts.run.report:
        run = session.loaded()
        console.print(f"report: {report.write(run, *measure.features(run.backbone, data))}")
    figures = {f"{name}_{key}": value for name, found in classifiers.items() for key, value in found.items()}
    trackers.conclude(session.loggers, session.loaded(), figures, session.steps)
    return summary
