"""`selfsight distill`: a student learns what a fine-tuned network answers for all images, labelled or not."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from selfsight.composition.chosen import group_choice
from selfsight.composition.overrides import compose
from selfsight.engine import build, inherit
from selfsight.engine.outcome import Outcome, outcome
from selfsight.engine.session import Session, reopen
from selfsight.jobs.finetune import conclude
from selfsight.runs.folder import RunFolder


def run(cfg: DictConfig) -> Outcome:
    """Distil, measure, export. Data set, labels and views are the teacher's where nothing else is said."""
    cfg, folder = reopen(cfg)
    student = None if cfg.student == inherit.SELF else student_backbone(str(cfg.student))
    cfg, teacher, classes = inherit.completed_for_distillation(cfg, student)
    parts = build.parts(cfg, folder or RunFolder.open(cfg.teacher), teacher=teacher)
    inherit.check_classes(classes, parts.datamodule.data.classes, cfg.teacher)
    session = Session.begin("distill", cfg, parts, folder, stem=f"distill-{parts.description.dataset}")
    return outcome(session.folder, conclude(session)) if session.fit() else Outcome({})


def student_backbone(name: str) -> DictConfig:
    """The configuration that ``backbone=name`` composes to.

    Raises:
        UserError: no such network.
    """
    word = f"backbone={name}"
    override = OverridesParser.create().parse_override(word)
    backbone: DictConfig = compose("pretrain", group_choice("backbone", word, override)).backbone
    return backbone
