"""`selfsight compare`: approaches x labels per class x seeds on one data set, as a table, a picture and a CSV."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import selfsight
from selfsight.errors import UserError, nearest
from selfsight.jobs import build, measure
from selfsight.jobs.console import make_console, make_table, quiet
from selfsight.jobs.page import figure_html, html_table, page
from selfsight.jobs.run_folder import RunFolder, write_atomically
from selfsight.jobs.steps import SOURCE, perform

COLUMNS = ("approach", "labels_per_class", "seed", "accuracy")
#: keys in which the same command may differ from the one that began the comparison: they only add rows
GROWING = ("seeds", "labels_per_class", "approaches", "name", "runs", "workers")

#: the step that is no run of its own: a linear probe on the features of the run before it
PROBE = "linear"

Row = tuple[str, int, int, float]
#: step, labels a class (0 where the step uses none), seed
Task = tuple[str, int, int]


def run(cfg: DictConfig) -> None:
    """Every row that is not there yet; the same command goes on where it was stopped, by SIGKILL, too."""
    quiet()
    console = make_console()
    check(cfg)
    folder = opened(cfg)
    table = folder.path / "comparison.csv"
    rows = read(table)
    wanted = {
        (str(name), int(labels), seed)
        for seed in range(cfg.seeds)
        for labels in cfg.labels_per_class
        for name in cfg.approaches
    }
    known = {row[:3] for row in rows}
    for task, found in done(cfg, folder, plan(cfg, wanted - known)):
        if task in wanted:
            rows.append((*task, found))
            write(table, rows)
            number = sum(row[:3] in wanted for row in rows)
            console.print(f"{number}/{len(wanted)}  {task[0]}, {title(task[1])}, seed {task[2]}: {found:.1%}")
    shown = [row for row in rows if row[:3] in wanted]
    show(console, shown, cfg)
    path = folder.path / "comparison.html"
    write_atomically(path, told(shown, cfg))
    console.print(f"{table}\n{path}")


def check(cfg: DictConfig) -> None:
    """Refuse a comparison without steps, and approaches and steps that start from what is none of them.

    Raises:
        UserError: naming the word.
    """
    if not cfg.get("steps"):
        raise UserError("say what is to be compared: recipe=digits/few_labels, or a recipe of your own with `steps`.")
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


def done(cfg: DictConfig, folder: RunFolder, before: Mapping[Task, Task | None]) -> Iterator[tuple[Task, float]]:
    """Each task with its accuracy as it comes to its end; several at a time, each on its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = (1 if torch.cuda.is_available() else cores) if cfg.workers == "auto" else int(cfg.workers)
    todo = list(before)
    if workers == 1:
        while todo:
            task = next(task for task in todo if before[task] not in todo)
            yield task, accuracy(cfg, folder, *task)
            todo.remove(task)
        return
    plain = OmegaConf.to_yaml(cfg, resolve=True)
    begin = (os.getpid(), max(1, cores // workers))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker, begin) as pool:
        running: dict[Future[float], Task] = {}
        try:
            while todo:
                busy = running.values()
                ready = [task for task in todo if task not in busy and before[task] not in todo]
                for task in ready[: workers - len(running)]:
                    running[pool.submit(in_worker, plain, folder.path, task)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    yield task, future.result()
                    todo.remove(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def begin_worker(parent: int, threads: int) -> None:
    """A worker outlives its parent by a second at most: what it would write belongs to the next command."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_worker(plain: str, folder: Path, task: Task) -> float:
    quiet()
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    return accuracy(cfg, RunFolder(folder), *task)


def opened(cfg: DictConfig) -> RunFolder:
    """The comparison's folder, made now or found as the same command has left it.

    Raises:
        UserError: it holds a comparison with other settings.
    """
    path = Path(cfg.runs).expanduser() / str(cfg.name or f"compare-{cfg.dataset.name}")
    folder = RunFolder(path)
    if (path / "config.yaml").is_file():
        old, new = folder.config(), OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
        assert isinstance(new, DictConfig)
        other = [str(key) for key in {*old, *new} if key not in GROWING and old.get(key) != new.get(key)]
        if other:
            raise UserError(f"'{path}' holds a comparison with another {min(other)}; give this one a name: name=NAME.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{path}' cannot be made ({error.strerror}); name a folder you may write: runs=DIR.") from None
    folder.write_config(cfg)
    return folder


def accuracy(cfg: DictConfig, folder: RunFolder, name: str, labels: int, seed: int) -> float:
    """Test accuracy of a step after its last epoch, not a number where it learns no class."""
    step = cfg.steps[name]
    if step.job == PROBE:
        return probe(perform_step(cfg, folder, str(step.after), labels, seed)[1], labels, seed)
    summary, _ = perform_step(cfg, folder, name, labels, seed)
    return float(summary.get("classifiers", {}).get(step.get("measured", "student"), {}).get("top1", math.nan))


def probe(source: Path, labels: int, seed: int) -> float:
    """Test accuracy of a logistic regression on a run's frozen features of the images that keep their labels.

    They are the images that all other approaches with this seed are given.
    """
    cfg = RunFolder(source).config()
    data = build.datamodule(cfg)
    backbone = selfsight.load(source).to(build.device(cfg.trainer.accelerator))
    split = build.library("datamodules").select_labels(
        data.data.train, per_class=labels, seed=seed, classes=data.data.classes
    )
    train, test = measure.features(backbone, data)
    few = train.take(torch.isin(train.indices, split.tensor()))
    return float(build.library("evaluation.linear").FewShot().fit(few, test)["linear_top1"])


def perform_step(cfg: DictConfig, folder: RunFolder, name: str, labels: int, seed: int) -> tuple[dict[str, Any], Path]:
    """Summary and folder of a step. One that uses no labels is shared by all numbers of them."""
    step = cfg.steps[name]
    settings: dict[str, Any] = {"dataset": cfg.dataset, "seed": seed, "report": False}
    labelled = step.get("labelled", True)
    if labelled:
        settings["labels.per_class"] = labels
    if step.get("after") is not None:
        _, source = perform_step(cfg, folder, str(step.after), labels, seed)
        settings[SOURCE[step.job]] = str(source)
    if step.get("after") is None or step.job == "pretrain":
        settings["backbone"] = cfg.backbone
    if step.job == "pretrain":
        settings["evaluator.final"] = {}
    place = folder.path / "runs" / (f"{name}-{labels}-{seed}" if labelled else f"{name}-{seed}")
    words = [*([f"dataset={choice(cfg.dataset)}"] if step.job == "pretrain" else []), *step.words, *cfg.words]
    log = folder.path / "logs" / f"{place.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return perform(step.job, words, place, settings), place


def choice(dataset: DictConfig) -> str:
    """``digits`` out of ``selfsight.datamodules.digits``: what the data set is called on the command line."""
    return str(dataset._target_).rsplit(".", 1)[-1]


def read(path: Path) -> list[Row]:
    """The rows of a comparison that are finished."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        return [(r["approach"], int(r["labels_per_class"]), int(r["seed"]), float(r["accuracy"])) for r in found]


def write(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=os.linesep)
    writer.writerow(COLUMNS)
    writer.writerows((*row[:3], f"{row[3]:.6f}") for row in rows)
    write_atomically(path, text.getvalue())


def cells(rows: Sequence[Row], name: str, labels: int) -> tuple[float, float, int]:
    """Mean and standard deviation over seeds of a cell of the table, and how many there are."""
    found = [row[3] for row in rows if row[:2] == (name, labels)]
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def cell_text(rows: Sequence[Row], name: str, labels: int) -> str:
    mean, spread, count = cells(rows, name, labels)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if count > 1 else f"{100 * mean:.1f} %"


def title(labels: int) -> str:
    return f"{labels} label{'s' * (labels != 1)} a class"


def show(console: Console, rows: Sequence[Row], cfg: DictConfig) -> None:
    table = make_table("", *[title(labels) for labels in cfg.labels_per_class])
    for name in cfg.approaches:
        table.add_row(str(name), *[cell_text(rows, name, labels) for labels in cfg.labels_per_class])
    console.print(table)
    console.print(f"test accuracy after the last epoch, mean and standard deviation of {cfg.seeds} seeds", style="dim")


def told(rows: Sequence[Row], cfg: DictConfig) -> str:
    """The comparison as one self-contained page: picture with error bars, table, settings."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name in cfg.approaches:
        found = [cells(rows, name, labels) for labels in cfg.labels_per_class]
        spread = {"type": "data", "array": [s for _, s, _ in found], "visible": cfg.seeds > 1}
        means = [mean for mean, _, _ in found]
        figure.add_scatter(x=list(cfg.labels_per_class), y=means, error_y=spread, mode="lines+markers", name=str(name))
    figure.update_xaxes(type="log", title="labels a class", tickvals=list(cfg.labels_per_class))
    figure.update_yaxes(title="test accuracy", tickformat=".0%")
    titles = ["", *(title(labels) for labels in cfg.labels_per_class)]
    cells_of = [
        [str(name), *(cell_text(rows, name, labels) for labels in cfg.labels_per_class)] for name in cfg.approaches
    ]
    settings = html.escape(OmegaConf.to_yaml(cfg, resolve=True))
    return page(
        "few labels",
        [
            f"<h1>Few labels on {html.escape(str(cfg.dataset.name))}</h1>",
            f"<p class='soft'>Test accuracy after the last epoch, mean and standard deviation of {cfg.seeds} seeds; "
            "the labels differ from seed to seed and are the same for all approaches.</p>",
            figure_html(figure, 480),
            html_table("", titles, cells_of),
            f"<details><summary>configuration</summary><pre>{settings}</pre></details>",
        ],
    )
