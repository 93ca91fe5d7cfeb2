"""`selfsight compare`: approaches x labels a class, or figures, x seeds on one data set: a table, a picture, a CSV."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import selfsight
from selfsight.composition.overrides import compose_with
from selfsight.composition.places import check_places
from selfsight.datamodules import select_labels
from selfsight.engine import build, measure
from selfsight.engine.devices import device
from selfsight.engine.tasks import in_order
from selfsight.errors import UserError, nearest
from selfsight.evaluation.base import Figures
from selfsight.evaluation.probes.linear import FewShot
from selfsight.files import write_text
from selfsight.jobs.pipeline import SOURCE, perform
from selfsight.reporting.comparison import cell_text, columns, figure_of, figures, show, title, told
from selfsight.runs.comparison import TABLE, Row, drop_unused, opened, read, write
from selfsight.runs.console import make_console, quiet
from selfsight.runs.folder import RunFolder

#: the step that is no run of its own: a linear probe on the features of the run before it
PROBE = "linear"

#: step, labels a class (0 where the step uses none), seed
Task = tuple[str, int, int]
#: of a task, by the column of the table
Values = Mapping[int | str, float]


def run(cfg: DictConfig) -> None:
    """Every row that is not there yet; the same command goes on where it was stopped, by SIGKILL, too."""
    console = make_console()
    check(cfg)
    check_steps(cfg)
    folder = opened(cfg)
    try:
        rows = fill(console, cfg, folder)
    except Exception:
        drop_unused(folder)
        raise
    show(console, rows, cfg)
    path = folder.path / "comparison.html"
    write_text(path, told(rows, cfg))
    console.print(f"{folder.path / TABLE}\n{path}")


def fill(console: Console, cfg: DictConfig, folder: RunFolder) -> list[Row]:
    """The rows that are wanted: those in the table, and those that are added to it one by one."""
    table = folder.path / TABLE
    rows = read(table)
    wanted = {
        (str(name), column, seed) for seed in range(cfg.seeds) for column in columns(cfg) for name in cfg.approaches
    }
    lacking = wanted - {row[:3] for row in rows}
    for (name, _, seed), found in done(cfg, folder, plan(cfg, {task_of(cfg, *place) for place in lacking})):
        new: list[Row] = [(name, column, seed, value) for column, value in found.items()]
        new = [row for row in new if row[:3] in lacking]
        if new:
            rows += new
            write(table, rows)
            number = sum(row[:3] in wanted for row in rows)
            said = ", ".join(f"{title(row[1])} {cell_text([row], *row[:2])}" for row in new)
            console.print(f"{number}/{len(wanted)}  {name}, seed {seed}: {said}")
    return [row for row in rows if row[:3] in wanted]


def task_of(cfg: DictConfig, name: str, column: int | str, seed: int) -> Task:
    """What has to be done for a cell of the table. All figures of a run are those of one number of labels."""
    return name, int(cfg.labels_per_class[0] if figures(cfg) else column), seed


def check(cfg: DictConfig) -> None:
    """Refuse a comparison without steps, and approaches and steps that start from what is none of them.

    Raises:
        UserError: naming the word.
    """
    if not cfg.get("steps"):
        raise UserError("say what is to be compared: recipe=digits/few_labels, or a recipe of your own with `steps`.")
    if not cfg.approaches:
        raise UserError(f"say which of the steps make rows of the table: approaches=[{','.join(map(str, cfg.steps))}].")
    for name in cfg.approaches:
        if name not in cfg.steps:
            raise UserError(f"approach '{name}' is none of the steps.{nearest(str(name), map(str, cfg.steps))}")
    for name, step in cfg.steps.items():
        source = step.get("after")
        if source is None and step.job in (PROBE, "distill"):
            raise UserError(f"the step '{name}' ({step.job}) starts from another one: name it with `after`.")
        if source is not None and source not in cfg.steps:
            raise UserError(
                f"the step '{name}' comes after '{source}', which is none of the steps."
                f"{nearest(str(source), map(str, cfg.steps))}"
            )


def check_steps(cfg: DictConfig) -> None:
    """Refuse wrong words and values in the steps, and more labels a class than the images have.

    Raises:
        UserError: as the step itself would, but before anything is written.
    """
    most = max(cfg.labels_per_class)
    needed = {task[0] for task in plan(cfg, {(str(name), most, 0) for name in cfg.approaches})}
    steps = {name: step for name, step in cfg.steps.items() if name in needed and step.job != PROBE}
    configs = dict[str, DictConfig]()
    for name, step in steps.items():
        try:
            configs[name] = compose_with(step.job, step_words(cfg, step), settings(cfg, step, most, 0))
            check_places("compare", configs[name])
            build.check(step.job, configs[name])
        except UserError as error:
            raise UserError(
                f"the step '{name}' is refused: {error} Words for every step stand in words='[\"key=value\"]', for "
                f"this one in steps.{name}.words."
            ) from None
    data = build.dataset(next(configs[name] for name, step in steps.items() if step.get("after") is None))
    for labels in cfg.labels_per_class[:1] if figures(cfg) else cfg.labels_per_class:
        select_labels(data.train, per_class=labels, seed=0, classes=data.classes)


def plan(cfg: DictConfig, wanted: Collection[Task]) -> dict[Task, Task | None]:
    """Everything that has to be done for the wanted rows, with the task each one starts from.

    In order of urgency: seed by seed, within one as the recipe has the steps.
    """
    found: dict[Task, Task | None] = {}

    def add(name: str, labels: int, seed: int) -> Task:
        step = cfg.steps[name]
        key = (name, labels if step.get("labelled", True) else 0, seed)
        found[key] = None if step.get("after") is None else add(str(step.after), labels, seed)
        return key

    for task in wanted:
        add(*task)
    order = list(cfg.steps)
    urgency = sorted(found, key=lambda task: (task[2], order.index(task[0]), task[1]))
    return {task: found[task] for task in urgency}


def done(cfg: DictConfig, folder: RunFolder, before: Mapping[Task, Task | None]) -> Iterator[tuple[Task, Values]]:
    """Each task with its values as it comes to its end; several at a time, each on its share of the cores."""
    one_on_a_gpu = 1 if torch.cuda.is_available() else None
    workers = one_on_a_gpu if cfg.workers == "auto" else int(cfg.workers)
    return in_order(before, functools.partial(do, OmegaConf.to_yaml(cfg, resolve=True), folder.path), workers)


def do(plain: str, folder: Path, task: Task) -> Values:
    """A task's values, wherever it is done: the configuration comes as text."""
    quiet()
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    return values(cfg, RunFolder(folder), *task)


def values(cfg: DictConfig, folder: RunFolder, name: str, labels: int, seed: int) -> Values:
    """What a task gives the table: an accuracy for its number of labels, or the figures of its run."""
    if not figures(cfg):
        return {labels: accuracy(cfg, folder, name, labels, seed)}
    step = cfg.steps[name]
    trained = step.job != PROBE  # a probe is another row of the run before it
    summary, _ = perform_step(cfg, folder, name if trained else str(step.after), labels, seed)
    return {str(figure): figure_of(summary, str(figure), step, trained=trained) for figure in figures(cfg)}


def accuracy(cfg: DictConfig, folder: RunFolder, name: str, labels: int, seed: int) -> float:
    """Test accuracy of a step after its last epoch, not a number where it learns no class."""
    step = cfg.steps[name]
    if step.job == PROBE:
        return probe(perform_step(cfg, folder, str(step.after), labels, seed)[1], labels, seed)
    summary, _ = perform_step(cfg, folder, name, labels, seed)
    return figure_of(summary, "classifier_top1", step)


def probe(source: Path, labels: int, seed: int) -> float:
    """Test accuracy of a logistic regression on a run's frozen features of the images that keep their labels.

    They are the images that all other approaches with this seed are given.
    """
    cfg = RunFolder(source).config()
    data = build.datamodule(cfg, RunFolder(source))
    backbone = selfsight.load(source).to(device(cfg.trainer.accelerator))
    split = select_labels(data.data.train, per_class=labels, seed=seed, classes=data.data.classes)
    train, test = measure.features(backbone, data)
    assert test is not None, "the first of the steps was refused without test images"
    few = train.take(torch.isin(train.indices, split.tensor()))
    return float(FewShot().fit(few, test)["linear_top1"])


def perform_step(cfg: DictConfig, folder: RunFolder, name: str, labels: int, seed: int) -> tuple[Figures, Path]:
    """Summary and folder of a step. One that uses no labels is shared by all numbers of them."""
    step = cfg.steps[name]
    further = settings(cfg, step, labels, seed)
    if step.get("after") is not None:
        _, source = perform_step(cfg, folder, str(step.after), labels, seed)
        further[step.get("key", SOURCE[step.job])] = str(source)
    place = folder.path / "runs" / (f"{name}-{labels}-{seed}" if step.get("labelled", True) else f"{name}-{seed}")
    log = folder.path / "logs" / f"{place.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return perform(step.job, step_words(cfg, step), place, further), place


def step_words(cfg: DictConfig, step: DictConfig) -> list[str]:
    """A step's words as on the command line: the data set, its own, those for all."""
    return [*([f"dataset={cfg.choices.dataset}"] if step.job == "pretrain" else []), *step.words, *cfg.words]


def settings(cfg: DictConfig, step: DictConfig, labels: int, seed: int) -> dict[str, object]:
    """What the comparison says to a step, by key."""
    found: dict[str, object] = {"dataset": cfg.dataset, "seed": seed, "report": False}
    if step.get("labelled", True):
        found["labels.per_class"] = labels
    own = any(str(word).startswith("backbone=") for word in step.words)
    if not own and (step.get("after") is None or step.job == "pretrain"):
        found["backbone"] = cfg.backbone
    if step.job == "pretrain" and not figures(cfg):
        found["evaluator.final"] = {}
    return found
