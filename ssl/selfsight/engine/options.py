"""What a run is told besides its parts, typed and checked once: lengths, devices, places.

A default stands here where the constructor's signature is its only home; the files of `conf` say what a job or a choice
makes different.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

from omegaconf import DictConfig, ListConfig, OmegaConf

from selfsight.composition.catalogue import ADVISED
from selfsight.datamodules.datasets.amounts import refuse_other_than_one
from selfsight.errors import UserError, nearest
from selfsight.validation import (
    AUTO,
    AUTO_SWITCH,
    NULL,
    SHARE,
    SWITCH,
    Kind,
    above,
    at_least,
    check_fields,
    each,
    expect,
    number,
    one_of,
    whole,
)

#: Lightning's others would give the weights a type that images do not have
FASTEST = "fastest"  #: of the precisions, see `engine.precision`
PRECISIONS = ("auto", FASTEST, "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
#: each process is the command started again; what would be handed to forked or spawned ones cannot all be pickled
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


def is_folder_name(value: object) -> bool:
    text = "" if value is None else str(value)
    return not {"/", "\\"} & set(text) and text not in (".", "..")


FOLDER_NAME = Kind("a folder's name without '/' (runs=DIR says where it is kept)", is_folder_name)
FOLDER = Kind("a folder", lambda value: value is not None)
GPUS = Kind("a list of GPUs such as [0,1]", lambda v: each(whole(0)).fits(v) and len({*v}) == len(v))
DURATION = Kind(
    "days:hours:minutes:seconds such as 00:12:00:00",
    lambda v: isinstance(v, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", v) is not None,
)


class Options:
    """Typed values read from a node of a configuration; a dataclass whose annotations say what they may be."""

    #: where they stand in a configuration, for the sentence that refuses one
    place = ""

    def __post_init__(self) -> None:
        check_fields(self, self.place)

    @classmethod
    def read(cls, node: DictConfig | Mapping[str, object]) -> Self:
        """Those that ``node`` has, the others at their defaults; a list comes as a list of Python.

        Raises:
            UserError: a value that cannot be meant.
        """
        names = [field.name for field in fields(cls) if field.name in node]  # type: ignore[arg-type]
        return cls(**{name: _plain(node[name]) for name in names})


@dataclass(frozen=True)
class TrainerOptions(Options):
    """Devices, precision and length of a training.

    Attributes:
        max_epochs: passes over the images.
        max_steps: optimiser steps, in place of ``max_epochs``; schedules end with them.
        max_time: time after which it is over, as days:hours:minutes:seconds; schedules do not know of it.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: how many, or which GPUs; ``auto``: all of them, or one CPU process; as many as torchrun has started.
        num_nodes: machines; torchrun says by itself how many.
        strategy: ``auto``: ddp where there are several devices.
        precision: ``auto``: bf16-mixed on GPUs that compute in it, else 32-true; ``fastest``: on CPUs, too, where it is
            found to be faster.
        compile: compile the networks; ``auto``: on CUDA.
        cuda_graphs: compiled networks replay their kernels instead of launching them; not with ``accumulate``.
        channels_last: memory order of images and kernels: faster on GPUs and on CPUs.
        checkpoint_activations: compute the backbone's activations again in the backward pass: less memory, a third more
            time.
        accumulate: batches an optimiser step.
        grad_cache: views that the backbone takes at a time, while the loss compares those of the whole batch (gradient
            caching, exact); null: all of them. Networks are not compiled then.
        clip_norm: largest norm of the gradient; null: any.
        sync_batchnorm: BatchNorm over the images of all processes; ``auto``: on several GPUs. On CPUs several processes
            with BatchNorm learn what one does only with ``true``.
        limit_batches: batches an epoch, for tries.
        checkpoint_every: epochs between checkpoints; the last one is always kept.
        checkpoint_minutes: minutes between further ones, inside an epoch, too.
        deterministic: the same numbers each time.
        on_nan: ``stop`` where loss or gradient are no numbers, or ``skip`` the step: neither weights nor anything else
            that learns moves by it.
        max_skips_in_a_row, max_skips: steps that may be skipped, one after the other and in all, before it stops.
        look_every: batches between looks at loss and gradient, for each of which a GPU is waited for; ``auto``: 1 on
            CPUs and with ``on_nan=skip``, else 50. With 1 the step that went wrong is kept for `selfsight replay`.
    """

    place = "trainer."

    max_epochs: Annotated[int, whole(1)] = 100
    max_steps: Annotated[int | None, NULL | whole(1)] = None
    max_time: Annotated[str | None, NULL | DURATION] = None
    accelerator: Annotated[str, one_of(*ACCELERATORS)] = "auto"
    devices: Annotated[str | int | list[int], AUTO | whole(1) | GPUS] = "auto"
    num_nodes: Annotated[int, whole(1)] = 1
    strategy: str = "auto"
    precision: Annotated[str | int, one_of(*PRECISIONS)] = "auto"
    compile: Annotated[bool | str, AUTO_SWITCH] = "auto"
    cuda_graphs: Annotated[bool, SWITCH] = False
    channels_last: Annotated[bool | str, AUTO_SWITCH] = True
    checkpoint_activations: Annotated[bool, SWITCH] = False
    accumulate: Annotated[int, whole(1)] = 1
    grad_cache: Annotated[int | None, NULL | whole(1)] = None
    clip_norm: Annotated[float | None, NULL | above(0)] = None
    sync_batchnorm: Annotated[bool | str, AUTO_SWITCH] = "auto"
    limit_batches: Annotated[int | None, NULL | whole(1)] = None
    checkpoint_every: Annotated[int, whole(1)] = 1
    checkpoint_minutes: Annotated[float, above(0)] = 10.0
    deterministic: Annotated[bool, SWITCH] = True
    on_nan: Annotated[str, one_of("stop", "skip")] = "stop"
    max_skips_in_a_row: Annotated[int, whole(1)] = 5
    max_skips: Annotated[int, whole(1)] = 50
    look_every: Annotated[int | str, AUTO | whole(1)] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(word in str(self.strategy) for word in ("fsdp", "deepspeed", "parallel")):
            raise UserError(
                f"trainer.strategy={self.strategy} cuts parameters into pieces, and evaluation, export and report, "
                "which are the first process's alone, need them whole; use ddp, with "
                "trainer.checkpoint_activations=true where memory is short."
            )
        if self.on_nan == "skip" and self.look_every not in ("auto", 1):
            raise UserError(
                f"trainer.look_every={self.look_every} sees a step when it has been taken, and trainer.on_nan=skip has "
                "to see it before: leave out trainer.look_every."
            )
        if self.on_nan == "skip" and str(self.precision) in ("16-mixed", "16"):
            raise UserError(
                f"trainer.precision={self.precision} skips steps whose gradient is no number by itself, with another "
                "scale: leave out trainer.on_nan=skip, or take bf16-mixed or 32-true."
            )
        if self.strategy not in STRATEGIES:
            raise UserError(
                f"trainer.strategy is '{self.strategy}'; one of {', '.join(STRATEGIES)} was expected."
                f"{nearest(str(self.strategy), STRATEGIES)}"
            )


@dataclass(frozen=True)
class RunOptions(Options):
    """What a run is called, where it is kept, and what it begins with.

    Attributes:
        name: of the run folder; null: method, data set and a number.
        runs: the folder in which run folders are kept.
        resume: a run folder to go on with.
        extend: epochs that a run which goes on has been given beyond its first length.
        requeue: put the SLURM job in its queue again where SIGUSR1 has stopped the run.
        trust: build whatever a run folder names, and not only what `selfsight.trust` knows.
        seed: of weights, views and order.
        batch_size: images a step, over all devices.
        num_workers: processes that read and crop images.
        limit_images: of each part of the data set, evenly spaced, for tries.
        report: write report.html at the end.
    """

    name: Annotated[str | None, FOLDER_NAME] = None
    runs: Annotated[str, FOLDER] = "runs"
    resume: str | None = None
    extend: Annotated[int | None, NULL | whole(1)] = None
    requeue: Annotated[bool, SWITCH] = False
    trust: Annotated[bool, SWITCH] = False
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    batch_size: Annotated[int, whole(1)] = 256
    num_workers: Annotated[int | str, AUTO | whole(0)] = "auto"
    limit_images: Annotated[int | None, NULL | whole(1)] = None
    report: Annotated[bool, SWITCH] = True
    mu: Annotated[int, whole(1)] = 7
    steps_per_epoch: Annotated[int | None, NULL | whole(1)] = None
    layer: Annotated[int | str, AUTO | whole(0)] = "auto"


@dataclass(frozen=True)
class ProfileOptions(Options):
    """Steps that are timed, and those before them that are not."""

    steps: Annotated[int, whole(1)] = 20
    warmup: Annotated[int, whole(0)] = 5


#: figures of a run that may be columns of a comparison, and what they are called
FIGURES: Mapping[str, str] = {
    "knn_top1": "kNN",
    "linear_top1": "linear probe",
    "few_shot_1": "probe on 1 label a class",
    "few_shot_5": "probe on 5 labels a class",
    "few_shot_20": "probe on 20 labels a class",
    "classifier_top1": "its own classifier",
    "seconds": "training",
}


@dataclass(frozen=True)
class CompareOptions(Options):
    """The size of a comparison.

    Attributes:
        seeds: runs of every cell of the table. labels_per_class: the cells. figures: of each run, which are the cells
            then. workers: runs at a time.
    """

    seeds: Annotated[int, whole(1)] = 5
    labels_per_class: Annotated[Sequence[int], each(whole(1))] = (1, 4, 25)
    figures: Annotated[Sequence[str] | None, NULL | each(one_of(*FIGURES))] = None
    workers: Annotated[int | str, AUTO | whole(1)] = "auto"


@dataclass(frozen=True)
class PruneOptions(Options):
    """Which images of a data set are kept.

    Attributes:
        keep: share of the images. rule: those far from the prototypes, or those near them. balance: share of what is
            kept that is divided among the classes first. prototypes: clusters; None: see `pruning.default_prototypes`.
        iterations: of k-means. seed: of its first centres.
    """

    keep: Annotated[float, number("a share above 0 and at most 1", lambda v: 0 < v <= 1)] = 0.5
    rule: Annotated[str, one_of("hard", "easy")] = "hard"
    balance: Annotated[float, SHARE] = 0.0
    prototypes: Annotated[int | None, NULL | whole(1)] = None
    iterations: Annotated[int, whole(1)] = 50
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0


#: values inside nodes that become objects of their own, which would refuse them later or not at all
OF_NODES: Mapping[str, Kind] = {
    "optimizer.lr": at_least(0),
    "optimizer.weight_decay": NULL | at_least(0),
    "optimizer.sam": one_of("sam", "asam", None),
    "optimizer.sam_rho": NULL | at_least(0),
    "schedule.reference_batch": whole(1),
    "evaluator.online.every": whole(1),
}
OF_JOB: Mapping[str, type[Options]] = {
    "profile": ProfileOptions,
    "compare": CompareOptions,
    "prune": PruneOptions,
}


#: sizes that may be ``auto``, in an order in which each follows from those before it
BY_RULE = ("batch_size", "trainer.max_epochs", "schedule.lr.warmup_epochs")


def settled(cfg: DictConfig) -> DictConfig:
    """A configuration with 1 for each size that is yet to follow from the images."""
    wanted = [key for key in BY_RULE if OmegaConf.select(cfg, key, throw_on_missing=False) == "auto"]
    cfg = cfg.copy() if wanted else cfg
    for key in wanted:
        OmegaConf.update(cfg, key, 1)
    return cfg


def check(job: str, cfg: DictConfig) -> None:
    """Refuse values of a job's configuration that cannot be meant, before anything is built or written.

    Raises:
        UserError: see `selfsight.validation.expect`.
    """
    if job in ADVISED:
        cfg = settled(cfg)
    RunOptions.read(cfg)
    if job in OF_JOB:
        OF_JOB[job].read(cfg)
    for key, kind in OF_NODES.items():
        parent, _, leaf = key.rpartition(".")
        holder = OmegaConf.select(cfg, parent)
        if isinstance(holder, DictConfig) and leaf in holder:
            expect(key, holder[leaf], kind)
    if "trainer" in cfg:
        TrainerOptions.read(cfg.trainer)
    if job in ADVISED and cfg.get("labels") is not None:  # others may have those of an earlier run
        refuse_other_than_one(cfg.labels)


def _plain(value: object) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value


def resolved(cfg: DictConfig) -> dict[str, object]:
    """A configuration as plain containers, interpolations filled in."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}
