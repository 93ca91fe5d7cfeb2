"""A training, from its parts to its last checkpoint: one for pretraining, fine-tuning and distillation."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from selfsight.backbones.interface import one_line
from selfsight.backbones.registry import weights_line
from selfsight.checkpoints.export import export_backbone
from selfsight.datamodules import DataModule, LabelSplit
from selfsight.engine import advice, slurm
from selfsight.engine.about_data import about_absent_classes, about_few_tests, describe, show_classes
from selfsight.engine.build import Parts
from selfsight.engine.checkpointing import (
    AtomicCheckpoints,
    GracefulInterrupt,
    Interrupted,
    StepSeeds,
    TimedCheckpoints,
    checkpointing,
    epochs_done,
    usable_checkpoint,
)
from selfsight.engine.devices import device, spread
from selfsight.engine.monitor import Monitor
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.nodes import as_user_error
from selfsight.engine.performance import GraphSteps, apply_performance_options
from selfsight.engine.precision import resolve_precision, with_fastest
from selfsight.engine.prepared import PreparedCallback
from selfsight.engine.progress import ProgressBar
from selfsight.engine.reload import LoadedRun
from selfsight.errors import UserError
from selfsight.files import write_text
from selfsight.runs.console import make_console
from selfsight.runs.environment import command
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import on_first_process


def reopen(cfg: DictConfig) -> tuple[DictConfig, RunFolder | None]:
    """The configuration of a training, and the folder to go on in: those of ``cfg.resume`` where that names a run.

    A run that was stopped before its first checkpoint begins anew in its folder.

    Raises:
        UserError: there is no such run, or its checkpoint cannot be read.
    """
    if cfg.resume is None:
        return with_fastest(cfg), None
    folder = RunFolder.open(cfg.resume)
    if folder.began:
        usable_checkpoint(folder.checkpoint)
    of_run = folder.config_to_resume()
    if cfg.get("extend") is not None:
        lengthen(of_run, folder, int(cfg.extend))
    return of_run, folder


def lengthen(cfg: DictConfig, folder: RunFolder, epochs: int) -> None:
    """Give a run that has come to its end further epochs, here and in its folder. Typed again it goes on with them.

    Raises:
        UserError: it has not come to its end, or its length is not one in epochs.
    """
    if "then" in cfg or cfg.trainer.get("max_steps") is not None:
        raise UserError(
            f"extend={epochs} is for a run whose length is trainer.max_epochs and which no further jobs follow, and "
            f"'{folder.path}' is none."
        )
    done, whole = epochs_done(folder.checkpoint), int(cfg.trainer.max_epochs)
    if done < whole:
        if cfg.get("extend") == epochs:
            return
        raise UserError(
            f"'{folder.path}' has done {done} of its {whole} epochs; go on with it before it is lengthened: leave out "
            f"extend={epochs}."
        )
    longer = {"trainer.max_epochs": whole + epochs, "extend": epochs}
    written = folder.config()
    for key, value in longer.items():
        OmegaConf.update(cfg, key, value, force_add=True)
        OmegaConf.update(written, key, value, force_add=True)
    if on_first_process():
        folder.write_config(written)
        folder.summary.unlink(missing_ok=True)


@dataclass
class Session:
    """A training in its folder.

    Attributes:
        job: as the command line calls it. resumed: it goes on from the folder's checkpoint.
        seconds: of training, those before a stop included. loggers: that were told of it. steps: it has done in all.
            Known after `fit`.
    """

    job: str
    parts: Parts
    folder: RunFolder
    resumed: bool = False
    console: Console = field(default_factory=make_console)
    seconds: float = 0.0
    loggers: Sequence[Logger] = ()
    steps: int = 0

    @classmethod
    def begin(cls, job: str, cfg: DictConfig, parts: Parts, folder: RunFolder | None, stem: str) -> Session:
        """A session in a new folder, or in that of the run that goes on."""
        resumed = folder is not None and folder.began
        if folder is not None:
            folder.tidy()
        return cls(job, parts, folder or RunFolder.create(cfg, stem), resumed)

    def fit(self) -> bool:
        """Train to the end, or to a Ctrl-C; checkpoints, metrics and the labels used stay in the folder.

        Returns:
            Whether this is the process that goes on to measure: the first one.
        """
        parts, folder, data = self.parts, self.folder, self.parts.datamodule
        interrupt = GracefulInterrupt(folder.checkpoint)
        try:
            parts.method.configure(parts.recipe, parts.length)
            apply_performance_options(parts.method, parts.trainer, device(parts.trainer.accelerator))
            data.data.unreadable.write_to(folder.path / "unreadable.txt")
            if data.data.prepared is not None:  # what the images had gone through is part of the run
                write_text(folder.path / "prepared.json", json.dumps(data.data.prepared, indent=2) + "\n")
            guard = NanGuard(folder, self.console, parts.trainer, parts.run.seed)
            monitor = Monitor(folder, self.console, parts.online, guard)
            timed = TimedCheckpoints(folder.checkpoint, parts.trainer.checkpoint_minutes)
            bar = ProgressBar(self.console)
            trainer = make_trainer(parts, folder, [interrupt, timed, guard, parts.online, monitor, bar])
            interrupt.listen()
            if trainer.is_global_zero:
                if (split := labels_used(data)) is not None:
                    split.write(folder.labels)
                if not folder.data.is_file():  # what it goes on with, whatever becomes of the images
                    write_text(folder.data, json.dumps(data.dataset.manifest()) + "\n")
                self.print_header(trainer.world_size)
            trainer.fit(parts.method, datamodule=data, ckpt_path=self.checkpoint_to_resume(), weights_only=True)
        except Interrupted as stop:
            self.tell_stop(saved=stop.saved)
            if parts.run.requeue and stop.signal == getattr(signal, "SIGUSR1", None) and on_first_process():
                self.console.print(slurm.requeue(), markup=False, highlight=False)
            raise SystemExit(128 + stop.signal) from None
        except KeyboardInterrupt:  # before training has begun
            self.tell_stop(saved=False)
            raise
        except MisconfigurationException as error:  # how Lightning says what a part of one's own has to do
            folder.drop_unused()
            raise UserError(f"Lightning stopped: {one_line(error)}") from error
        except Exception:
            folder.drop_unused()
            raise
        finally:
            interrupt.restore()
        self.seconds, self.loggers, self.steps = monitor.seconds, trainer.loggers, trainer.global_step
        if trainer.is_global_zero and parts.trainer.max_time and trainer.current_epoch < (trainer.max_epochs or 0):
            self.console.print(
                f"trainer.max_time={parts.trainer.max_time} ended the training after {trainer.current_epoch} of "
                f"{trainer.max_epochs} epochs, before its schedules came to their end",
                style="yellow", markup=False, highlight=False,
            )  # fmt: skip
        if trainer.is_global_zero and (passed_over := str(data.data.unreadable)):
            self.console.print(f"passed over: {passed_over}", style="dim", markup=False)
        return trainer.is_global_zero

    def tell_stop(self, *, saved: bool) -> None:
        """Say what is kept of a training that was stopped, and how it goes on."""
        begun = saved or self.folder.began
        kept = "the last checkpoint is kept" if begun else "before the first checkpoint"
        how = "stopped, state saved" if saved else f"stopped at once, {kept}"
        again = "go on" if begun else "begin again"
        self.console.print(f"{how}; {again} with: selfsight {self.job} resume={self.folder.path}", highlight=False)

    def checkpoint_to_resume(self) -> str | None:
        """The file that the training goes on from: the last checkpoint, or the one before where that is damaged."""
        if not self.resumed:
            return None
        path, sentence = usable_checkpoint(self.folder.checkpoint)
        if sentence:
            self.console.print(f"[yellow]warning[/yellow] {escape(sentence)}")
        return str(path)

    def print_header(self, processes: int) -> None:
        """What is going to happen, in three lines; others say what a person may not expect of data and loss."""
        parts, names, length = self.parts, self.parts.description, self.parts.length
        data = parts.datamodule.data
        millions = sum(p.numel() for p in parts.method.backbone.parameters()) / 1e6
        recipe = parts.recipe
        self.console.print(
            f"{names.method} · {names.backbone} ({millions:.2f} M parameters) · {describe(data)}\n"
            f"batch {length.batch_size} ({processes} × {length.batch_size // processes}) · "
            f"{length.epochs:g} epoch{'s' * (length.epochs > 1)} of {length.steps_per_epoch} steps · "
            f"lr {recipe.told(length.batch_size)}\n"
            f"{self.folder.path}"
        )
        begun = names.backbone_arguments.get("pretrained")
        from_timm = f"begins with {weights_line(parts.method.backbone)}" if begun else ""
        facts = "" if data.bands is None else str(data.bands)
        callbacks = [one.about for one in parts.callbacks if isinstance(one, PreparedCallback)]
        of_run = (self.about_extension, names.presets, from_timm, parts.method.about, self.about_batches)
        about = (*of_run, *callbacks, facts)
        for line in filter(None, (*about, data.about_labels, *data.about)):
            self.console.print(line, style="dim", markup=False)
        adjusts = getattr(self.parts.method, "logit_adjustment", None) == 0
        show_classes(self.console, data, "method.logit_adjustment=1" if adjusts else "")
        absent = about_absent_classes(data) if parts.run.limit_images is None else ""
        for line in filter(None, (about_few_tests(data), absent)):
            self.console.print(line, style="yellow", markup=False)
        if parts.plan is not None and self.job == "pretrain" and not self.resumed:
            for line in advice.lines(parts.plan, command()):
                self.console.print(line, style="yellow", markup=False)

    @property
    def about_batches(self) -> str:
        """What the loss compares where that is not a plain batch; empty where it is one."""
        parts, batch = self.parts, self.parts.length.batch_size
        batches, cached, across = parts.trainer.accumulate, parts.trainer.grad_cache, parts.method.across_images
        said = []
        if batches > 1 and across:
            instead = "" if cached else " (trainer.grad_cache in place of trainer.accumulate makes it one)"
            said.append(f"{batches} batches of {batch // batches} make a step, not one of {batch}: {across}{instead}")
        if cached:
            alone = any("BatchNorm" in type(part).__name__ for part in parts.method.backbone.modules())
            but = ", and BatchNorm sees them alone" if alone else ""
            said.append(f"{cached} views at a time go through the backbone, twice, for one loss of all{but}")
        return "; ".join(said)

    @property
    def about_extension(self) -> str:
        """What becomes of the schedules of a run that has been given further epochs; empty for another one."""
        extend, length, recipe = self.parts.run.extend, self.parts.length, self.parts.recipe
        if extend is None or not self.resumed:
            return ""
        before = replace(length, epochs=length.epochs - extend)
        old, new = recipe.values(before.total_steps - 1, before)["lr"], recipe.values(before.total_steps, length)["lr"]
        more = f"{extend} epoch{'s' * (extend > 1)} more than the {before.epochs:g} it had"
        return (
            f"{more}: schedules are those of a run of "
            f"{length.epochs:g} epochs, and the learning rate goes on from {new:.3g}, where it had come to {old:.3g}"
        )

    def export_backbone(self) -> None:
        """The backbone as a plain file, with what has to be known to use it."""
        names, view = self.parts.description, self.parts.datamodule.views[0]
        export_backbone(
            self.parts.method.measured,
            {
                "backbone": names.backbone_arguments,
                "image_size": names.image_size,
                "mean": view.mean,
                "std": view.std,
                "method": names.method,
                "dataset": names.dataset,
                "epochs": self.parts.length.epochs,
            },
            self.folder.path,
        )

    def loaded(self) -> LoadedRun:
        """The run as it lies in memory, for those who look at finished runs."""
        parts = self.parts
        return LoadedRun(self.folder, parts.description, parts.datamodule, parts.method.measured, parts.method)


def labels_used(data: DataModule) -> LabelSplit | None:
    """Which images keep their labels, where a run learns from some of them only."""
    split: LabelSplit | None = getattr(data, "split", None)
    return split


def make_trainer(parts: Parts, folder: RunFolder, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer with our choices for what the options leave to us.

    Args:
        callbacks: of the run itself; those that were configured come after them.
    """
    options = parts.trainer
    where = device(options.accelerator)
    devices, nodes, strategy, plugins = spread(options, where, parts.run.batch_size)
    if options.cuda_graphs:
        callbacks = [GraphSteps(), *callbacks]
    last = checkpointing(folder.checkpoint, options.checkpoint_every)
    with as_user_error("trainer"):
        return Trainer(
            default_root_dir=folder.path,
            accelerator="gpu" if where.type == "cuda" else "cpu",
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=resolve_precision(options.precision, where),  # type: ignore[arg-type]
            max_epochs=options.max_epochs,
            max_steps=-1 if options.max_steps is None else options.max_steps,
            max_time=options.max_time,
            limit_train_batches=options.limit_batches,
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.clip_norm,
            deterministic="warn" if options.deterministic else False,
            benchmark=where.type == "cuda",
            use_distributed_sampler=False,  # the datamodule splits the global batch itself
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=[make(folder) for make in parts.loggers],
            plugins=[AtomicCheckpoints(), *plugins],
            callbacks=[StepSeeds(parts.run.seed), *callbacks, *parts.callbacks, last],
        )
