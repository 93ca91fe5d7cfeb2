"""`selfsight pretrain`: data, network, method, training, measurement, export."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning import seed_everything
from omegaconf import DictConfig
from rich.console import Console

from selfsight.checkpoints.export import export_backbone
from selfsight.datamodules.datasets.splits import chosen_labels
from selfsight.engine import build, measure
from selfsight.engine.checkpointing import GracefulInterrupt, Interrupted, read_checkpoint
from selfsight.engine.monitor import Monitor
from selfsight.engine.performance import quicken
from selfsight.errors import UserError
from selfsight.jobs import report
from selfsight.methods.base import Method
from selfsight.optim.schedule import Clock
from selfsight.reporting import classification
from selfsight.runs.console import clock_text, make_console, quiet
from selfsight.runs.folder import RunFolder, write_atomically


def run(cfg: DictConfig) -> None:
    """One run, from data to report. What can be refused is refused before the run folder is made."""
    quiet()
    console = make_console()
    resumed = RunFolder.open(cfg.resume) if cfg.resume is not None else None
    if resumed is not None:
        read_checkpoint(resumed.checkpoint)
        cfg = resumed.config()
        if resumed.labels.is_file():
            cfg.datamodule.labels = {"split": str(resumed.labels)}
        if "then" in cfg and resumed.summary.is_file():
            return follow(cfg, resumed)
    build.device(cfg.trainer.accelerator)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data = build.datamodule(cfg, resumed)
    method = build.method(cfg, data)
    check_views(method, data)
    check_sizes(method, data)
    if "then" in cfg:  # what later steps would refuse is refused now
        chosen_labels(data.data.train, build.resolved(cfg.labels), data.data.classes)
    folder = resumed or RunFolder.create(cfg, stem=f"{method_name(cfg)}-{cfg.dataset.name}")
    seconds = fit("pretrain", cfg, folder, method, data, console, resumed is not None)
    if seconds is not None:
        conclude(console, cfg, folder, method, data, seconds)
        if "then" in cfg:
            follow(cfg, folder)
    return None


def follow(cfg: DictConfig, folder: RunFolder) -> None:
    """The steps a recipe has after pretraining."""
    from selfsight.jobs import pipeline

    pipeline.follow(cfg, folder)


def fit(
    job: str, cfg: DictConfig, folder: RunFolder, method: Method, data: Any, console: Console, resumed: bool
) -> float | None:
    """Train to the end, or to a Ctrl-C; checkpoints, metrics and the labels used stay in the folder.

    Returns:
        Seconds, those before a stop included, on the first process; None on the others.
    """
    try:
        clock = build.clock(cfg, data)
        method.configure(build.recipe(cfg), clock)
        quicken(method, cfg.trainer, build.device(cfg.trainer.accelerator))
        data.data.unreadable.write_to(folder.path / "unreadable.txt")
        if data.data.prepared is not None:  # what the images had gone through is part of the run
            write_atomically(folder.path / "prepared.json", json.dumps(data.data.prepared, indent=2) + "\n")
        evaluation = build.build(cfg.evaluator.online)
        monitor = Monitor(folder, console, evaluation)
        trainer = build.trainer(cfg, folder, [GracefulInterrupt(folder.checkpoint), evaluation, monitor])
        if trainer.is_global_zero:
            if hasattr(data, "split"):
                data.split.write(folder.labels)
            if not folder.data.is_file():  # what it goes on with, whatever becomes of the images
                write_atomically(folder.data, json.dumps(data.dataset.manifest()) + "\n")
            introduce(console, cfg, folder, method, data, clock, trainer.world_size)
        trainer.fit(method, datamodule=data, ckpt_path=str(folder.checkpoint) if resumed else None, weights_only=True)
    except Interrupted:
        console.print(f"stopped, state saved; go on with: selfsight {job} resume={folder.path}")
        raise SystemExit(130) from None
    except Exception:
        folder.drop_unused()
        raise
    return monitor.seconds if trainer.is_global_zero else None


def method_name(cfg: DictConfig) -> str:
    """``simclrv2`` out of ``selfsight.methods.simclrv2.SimCLRv2``."""
    return str(cfg.method._target_).split(".")[-2]


def check_views(method: Method, data: Any) -> None:
    """Refuse views the method cannot learn from.

    Raises:
        UserError: too few or too many views.
    """
    fewest, most = method.n_views
    given = sum(view.count for view in data.views)
    if given < fewest or (most is not None and given > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise UserError(
            f"{type(method).__name__} learns from {wanted} views of an image and the views chosen give {given}; "
            "set views.<name>.count or choose other views."
        )


def check_sizes(method: Method, data: Any) -> None:
    """Refuse views that shrink to nothing inside the backbone: tried on a copy without memory.

    Raises:
        UserError: naming the view's size.
    """
    backbone = copy.deepcopy(method.backbone).to("meta").eval()
    for size in sorted({view.size for view in data.views}):
        try:
            backbone(torch.empty(2, 3, size, size, device="meta"))
        except RuntimeError as error:
            if "size" in str(error).lower():
                raise UserError(
                    f"views of {size} x {size} pixels shrink to nothing inside this backbone; take larger views "
                    "(dataset.image_size=) or a backbone that shrinks less (backbone.stem=cifar, for ResNets)."
                ) from None
            raise


def introduce(
    console: Console, cfg: DictConfig, folder: RunFolder, method: Method, data: Any, clock: Clock, processes: int
) -> None:
    """What is going to happen, in three lines; a fourth says where a folder's labels are from."""
    millions = sum(p.numel() for p in method.backbone.parameters()) / 1e6
    backbone = cfg.backbone.get("name", "backbone")
    peak = build.recipe(cfg).peak_lr(clock.batch_size)
    console.print(
        f"{method_name(cfg)} · {backbone} ({millions:.2f} M parameters) · {measure.describe(data.data)}\n"
        f"batch {clock.batch_size} ({processes} × {clock.batch_size // processes}) · "
        f"{clock.epochs} epoch{'s' * (clock.epochs > 1)} of {clock.steps_per_epoch} steps · "
        f"lr {cfg.optimizer.lr:g} → {peak:.4g} ({cfg.schedule.scaling} scaling)\n"
        f"{folder.path}"
    )
    for line in filter(None, (data.data.about_labels, *data.data.about)):
        console.print(line, style="dim", markup=False)


def carry_away(cfg: DictConfig, folder: RunFolder, method: Method, data: Any) -> None:
    """The backbone as a plain file, with what has to be known to use it."""
    export_backbone(
        method.backbone,
        {
            "backbone": build.resolved(cfg.backbone),
            "image_size": cfg.dataset.image_size,
            "mean": data.views[0].mean,
            "std": data.views[0].std,
            "method": method_name(cfg),
            "dataset": cfg.dataset.name,
            "epochs": cfg.trainer.max_epochs,
        },
        folder.path,
    )


def conclude(console: Console, cfg: DictConfig, folder: RunFolder, method: Method, data: Any, seconds: float) -> None:
    """Export the backbone, measure it beside pixels and an untrained twin, write summary and report."""
    carry_away(cfg, folder, method, data)
    final = {name: build.build(node) for name, node in cfg.evaluator.final.items()}
    trained = measure.features(method.backbone, data) if final or cfg.report else (None, None)
    summary = beside_untrained(cfg, method, data, final, trained) if final else {}
    protocols = measure.protocols(final, data)
    if final:
        measure.show(console, summary, protocols)
    classifiers = classification.record(console, folder, method, data)
    classes = list(data.data.classes)
    folder.write_summary(
        {**summary, "classifiers": classifiers, "classes": classes, "train_seconds": seconds, "protocols": protocols}
    )
    console.print(f"trained in {clock_text(seconds)}; backbone: {folder.path / 'backbone.safetensors'}")
    if cfg.report:
        console.print(f"report: {report.write(folder, cfg, data, *trained)}")


def beside_untrained(
    cfg: DictConfig, method: Method, data: Any, evaluators: Mapping[str, Any], trained: tuple[Any, Any]
) -> dict[str, Any]:
    """The figures of raw pixels, of the network as it began, and of the trained one with its features ``trained``."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    networks = {"pixels": measure.Pixels(), "untrained": build.build(cfg.backbone).to(method.device)}
    pairs = {name: measure.features(network, data) for name, network in networks.items()}
    networks, pairs = networks | {"pretrained": method.backbone}, pairs | {"pretrained": trained}
    evaluators = measure.applicable(evaluators, labelled=not measure.lacking(data))
    return {name: measure.numbers(evaluators, networks[name], data, pair) for name, pair in pairs.items()}
