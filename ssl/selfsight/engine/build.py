"""From a composed configuration to the parts of a run. Jobs share these; each part can be built alone in a notebook."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from selfsight.checkpoints.load import start_from
from selfsight.datamodules.datasets.manifest import Manifest
from selfsight.engine.checkpointing import AtomicCheckpoints, StepSeeds, checkpointing
from selfsight.engine.devices import spread
from selfsight.engine.performance import GraphSteps, wanted
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock
from selfsight.runs.folder import RunFolder

#: how constructors refuse arguments
REFUSALS = (TypeError, ValueError, AssertionError, MisconfigurationException)


def build(node: Any, **extra: Any) -> Any:
    """`hydra.utils.instantiate`; what the thing configured refuses is a user's mistake, as `telling` says it."""
    with telling(place(node)):
        # Objects are added after Hydra is done: it would make configurations of the dataclasses among them.
        if extra:
            return instantiate(node, _convert_="all", _partial_=True)(**extra)
        return instantiate(node, _convert_="all")


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """A constructor's complaint about the values it is given, as a sentence.

    Raises:
        UserError: the constructor's own, or ``what`` with the reason it gives.
    """
    try:
        yield
    except (InstantiationException, OmegaConfBaseException, *REFUSALS) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise UserError(f"{what} cannot be made with these values: {reason}.") from error


def place(node: Any) -> str:
    """``evaluator.final.knn (selfsight.evaluation.probes.knn.KNN)``: key and class of a node, as far as it has them."""
    if not isinstance(node, DictConfig):
        return "a part of the run"
    key, target = node._get_full_key(None), node.get("_target_")
    return f"{key} ({target})" if key and target else str(key or target)


def views(cfg: DictConfig) -> dict[str, Any]:
    """The views by name, in their order in a batch."""
    return {str(name): build(node) for name, node in cfg.views.items() if name != "engine"}


def datamodule(cfg: DictConfig, of: RunFolder | None = None) -> Any:
    """The LightningDataModule of a run: data set and views, batched; ``of`` a run that has begun, see `images`."""
    here = device(cfg.trainer.accelerator, strict=False)
    asked = inspect.signature(get_class(cfg.datamodule._target_)).parameters
    fast = {name: wanted(cfg.trainer[name], here) for name in ("compile", "channels_last") if name in asked}
    return build(cfg.datamodule, data=images(cfg, of), views=views(cfg), **fast)


def images(cfg: DictConfig, of: RunFolder | None = None) -> Any:
    """The data set, or a small part of it where the configuration limits it.

    With ``of``, a run that has begun or ended, it is the one of then, see `of_run`.
    """
    data = build(cfg.dataset)
    data = data if of is None else of_run(data, cfg.dataset, of)
    return data if cfg.get("limit_images") is None else data.limited(cfg.limit_images)


#: values of a data set that do not say which images there are
PRESENTATION = ("name", "image_size", "eval_resize", "mean", "std", "resident", "max_unreadable", "max_pixels")


def of_run(data: Any, node: DictConfig, folder: RunFolder) -> Any:
    """The data set of a run as it was when the run began: its images, their split, classes and labels.

    Another data set, or another split of it, stays as it is; what of its test images the run has learned from is told.
    """

    def choice(dataset: DictConfig) -> dict[str, Any]:
        return {key: value for key, value in resolved(dataset).items() if key not in PRESENTATION}

    recorded = Manifest.read(folder.data)
    if recorded is None:
        return data
    if choice(node) == choice(folder.config().dataset):
        return data.as_recorded(recorded)
    data.warn_of_trained(recorded)
    return data


def recipe(cfg: DictConfig) -> OptimizationRecipe:
    """Optimiser and schedules. The learning rate in the configuration is the one for the reference batch.

    A null takes away an option that the optimiser does not have: one that stood there for another optimiser.
    """
    known = inspect.signature(get_class(cfg.optimizer._target_)).parameters
    options = {k: v for k, v in cfg.optimizer.items() if k != "lr" and (v is not None or k in known)}
    schedules = {str(k): build(v) for k, v in cfg.schedule.items() if isinstance(v, DictConfig) and "_target_" in v}
    optimizer = build(OmegaConf.create({**options, "_partial_": True}))
    with telling(place(cfg.optimizer)):  # it refuses values as soon as it has something to optimise
        optimizer([nn.Parameter(torch.zeros(1))], lr=float(cfg.optimizer.lr))
    return OptimizationRecipe(
        optimizer=optimizer,
        lr=float(cfg.optimizer.lr),
        schedules=schedules,
        scaling=cfg.schedule.scaling,
        reference_batch=cfg.schedule.reference_batch,
        # Lightning refuses to clip what a fused optimiser will scale back itself
        fused=device(cfg.trainer.accelerator, strict=False).type == "cuda" and not cfg.trainer.clip_norm,
    )


def method(cfg: DictConfig, data: Any, **parts: Any) -> Method:
    """The method with its backbone, which begins with the weights of the run ``cfg.start`` where one is named.

    What its constructor asks of the images (``num_classes``, ``num_images``, ``labels``, ...) and the configuration
    does not say, the datamodule tells. ``parts`` come from other runs.
    """
    asked = inspect.signature(get_class(cfg.method._target_)).parameters
    told = {name: fact for name, fact in data.facts.items() if name in asked and name not in cfg.method}
    backbone = build(cfg.backbone)
    if cfg.get("start") is not None:
        start_from(backbone, cfg.start)
    made: Method = build(cfg.method, backbone=backbone, **told, **parts)
    return made


def device(name: str, *, strict: bool = True) -> torch.device:
    """``auto``, ``cpu``, ``gpu`` or ``cuda`` as a device.

    Raises:
        UserError: another word, or a GPU was asked for and there is none; without ``strict`` it is the CPU then.
    """
    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"accelerator is '{name}'; auto, cpu, gpu or cuda was expected.", status=2)
    if strict and name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={name} asks for a GPU and PyTorch sees none; use trainer.accelerator=cpu or auto."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def clock(cfg: DictConfig, module: Any) -> Clock:
    """Lengths of the run in optimiser steps. `accumulate` batches make one step, and so do those left at the end."""
    steps = module.steps_per_epoch
    if cfg.trainer.limit_batches is not None:
        steps = min(steps, cfg.trainer.limit_batches)
    return Clock(
        examples=module.examples,
        batch_size=cfg.batch_size * cfg.trainer.accumulate,
        epochs=cfg.trainer.max_epochs,
        steps_per_epoch=max(1, math.ceil(steps / cfg.trainer.accumulate)),
    )


def trainer(cfg: DictConfig, folder: RunFolder, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer with our choices for what the configuration leaves to us."""
    options = cfg.trainer
    where = device(options.accelerator)
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    devices, strategy, plugins = spread(options, where, cfg.batch_size)
    nodes = (cfg.get("logger") or {}).values()  # logger=null leaves no such key
    loggers = [build(node, save_dir=str(folder.path)) for node in nodes if isinstance(node, DictConfig)]
    if options.get("cuda_graphs"):
        callbacks = [GraphSteps(), *callbacks]
    with telling("trainer"):
        return Trainer(
            default_root_dir=folder.path,
            accelerator="gpu" if where.type == "cuda" else "cpu",
            devices=devices,
            num_nodes=options.num_nodes,
            strategy=strategy,
            precision=precision,
            max_epochs=options.max_epochs,
            limit_train_batches=options.limit_batches,
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.clip_norm,
            deterministic="warn" if options.deterministic else False,
            benchmark=where.type == "cuda",
            use_distributed_sampler=False,  # the datamodule splits the global batch itself
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=loggers,
            plugins=[AtomicCheckpoints(), *plugins],
            callbacks=[StepSeeds(cfg.seed), *callbacks, checkpointing(folder.checkpoint, options.checkpoint_every)],
        )


def resolved(cfg: DictConfig) -> Mapping[str, Any]:
    """The configuration as plain containers, interpolations filled in."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}
