"""`selfsight distill`: a student learns what a fine-tuned network answers for all images, labelled or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from selfsight.cli import compose, group_choice
from selfsight.engine import build
from selfsight.errors import UserError
from selfsight.jobs.finetune import chosen, classifier_of, conclude, fill_views, reopened
from selfsight.jobs.pretrain import check_sizes, check_views, fit
from selfsight.runs.console import make_console, quiet
from selfsight.runs.folder import RunFolder

SELF = "self"


def run(cfg: DictConfig) -> None:
    """Distil, measure, export. Data set, labels and views are the teacher's where nothing else is said."""
    quiet()
    console = make_console()
    OmegaConf.set_struct(cfg, False)
    resumed = None
    if cfg.resume is not None:
        resumed, cfg, _ = reopened(cfg.resume)
    build.device(cfg.trainer.accelerator)
    seed_everything(cfg.seed, workers=True, verbose=False)
    source = RunFolder.open(cfg.teacher)
    teacher, classes = taught_by(source, cfg)
    data = build.datamodule(cfg, resumed or source)
    check_classes(classes, data.data.classes, cfg.teacher)
    method = build.build(
        cfg.method, backbone=build.build(cfg.backbone), teacher=teacher, num_classes=data.data.num_classes
    )
    check_views(method, data)
    check_sizes(method, data)
    folder = resumed or RunFolder.create(cfg, stem=f"distill-{cfg.dataset.name}")
    seconds = fit("distill", cfg, folder, method, data, console, resumed is not None)
    if seconds is not None:
        conclude(console, cfg, folder, method, data, seconds)


def taught_by(source: RunFolder, cfg: DictConfig) -> tuple[nn.Module, list[str]]:
    """The teacher and its classes; what ``cfg`` leaves open is filled in from the teacher's run."""
    network, classes = classifier_of(source)
    of_teacher = source.config()
    itself = cfg.student == SELF
    if cfg.get("backbone") is None:
        cfg.backbone = of_teacher.backbone if itself else student_backbone(str(cfg.student))
    cfg.dataset = chosen(cfg.get("dataset"), of_teacher.dataset)
    if cfg.method.temperature == "auto":
        cfg.method.temperature = 0.1 if itself else 1.0
    amounts = ("per_class", "total", "fraction", "list", "split")
    if cfg.labels.rule != "all" and all(cfg.labels.get(key) is None for key in amounts):
        cfg.labels.split = str(source.labels)
    fill_views(cfg, of_teacher.views)
    return network, classes


def student_backbone(name: str) -> DictConfig:
    """The configuration that ``backbone=name`` composes to.

    Raises:
        UserError: no such network.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = f"backbone={name}"
    override = OverridesParser.create().parse_override(word)
    backbone: DictConfig = compose("pretrain", group_choice("backbone", word, override)).backbone
    return backbone


def check_classes(teacher: Sequence[str], student: Sequence[str], name: Any) -> None:
    """Refuse a teacher of other classes.

    Raises:
        UserError: names the first difference.
    """
    if list(teacher) == list(student):
        return
    pairs = zip([*teacher, *["nothing"] * len(student)], [*student, *["nothing"] * len(teacher)], strict=False)
    place, (first, second) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"the teacher '{name}' answers with {len(teacher)} classes and the data set has {len(student)}: class {place} "
        f"is '{first}' for the one and '{second}' for the other; choose the data set that the teacher has learned from."
    )
