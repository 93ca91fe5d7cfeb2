"""The one door from a configuration to the parts of a run. What goes on behind it is typed; no `DictConfig` does."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning import seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from selfsight.checkpoints.load import start_from
from selfsight.datamodules import ImageData, ImageDataModule
from selfsight.engine import options
from selfsight.engine.devices import device, resolve_auto, spread
from selfsight.engine.options import RunOptions, TrainerOptions
from selfsight.errors import UserError
from selfsight.evaluation import OnlineEvaluation
from selfsight.evaluation.base import Evaluator
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

#: how constructors refuse arguments
REFUSALS = (TypeError, ValueError, AssertionError, MisconfigurationException)


@dataclass(frozen=True)
class Description:
    """What a run is called by, for headings and for the files that go out into the world.

    Attributes:
        method, backbone, dataset: their names. method_class: ``SwAV``.
        backbone_arguments: what the backbone is made with, ``_target_`` included.
        settings: the whole configuration as YAML.
    """

    method: str
    method_class: str
    backbone: str
    dataset: str
    backbone_arguments: Mapping[str, Any]
    image_size: int
    batch_size: int
    epochs: int
    seed: int
    settings: str


@dataclass(frozen=True)
class Parts:
    """Everything a training is made of.

    Attributes:
        length: in steps, epochs and examples.
        online: evaluation while training. final: evaluators of the table at the end, by name.
        callbacks: further ones, by their order. loggers: each is called with the folder it writes into.
        untrained: a backbone like the one that is trained, with weights of its own.
    """

    datamodule: ImageDataModule
    method: Method
    recipe: OptimizationRecipe
    length: Clock
    trainer: TrainerOptions
    run: RunOptions
    description: Description
    online: OnlineEvaluation
    final: Mapping[str, Evaluator]
    callbacks: list[Callback]
    loggers: list[Callable[..., Logger]]
    untrained: Callable[[], nn.Module]


def parts(cfg: DictConfig, **inherited: Any) -> Parts:
    """The parts of a training, from a seed that its configuration names.

    Args:
        inherited: arguments of the method that come from another run: a trained ``backbone``, a ``projector``, a
            ``teacher``.

    Raises:
        UserError: a value that cannot be meant, or parts that do not go together.
    """
    run, trainer = RunOptions.read(cfg), TrainerOptions.read(cfg.trainer)
    where = device(trainer.accelerator)
    spread(trainer, where, run.batch_size)
    seed_everything(run.seed, workers=True, verbose=False)
    data = datamodule(cfg)
    learner = method(cfg, data, **inherited)
    check_views(learner, data)
    check_sizes(learner, data)
    made = recipe(cfg)
    callbacks, loggers = (
        [node for node in (cfg.get(group) or {}).values() if isinstance(node, DictConfig)]  # null leaves no such key
        for group in ("callbacks", "logger")
    )
    return Parts(
        datamodule=data,
        method=learner,
        recipe=made,
        length=length(cfg, data),
        trainer=trainer,
        run=run,
        description=describe(cfg),
        online=build(cfg.evaluator.online),
        final={str(name): build(node) for name, node in (cfg.evaluator.get("final") or {}).items()},
        callbacks=[build(node) for node in callbacks],
        loggers=[partial(build, node) for node in loggers],
        untrained=partial(build, cfg.backbone),
    )


# --- single parts ----------------------------------------------------------------------------------------------------


def views(cfg: DictConfig) -> dict[str, Any]:
    """The views by name, in their order in a batch."""
    return {str(name): build(node) for name, node in cfg.views.items() if name != "engine"}


def datamodule(cfg: DictConfig) -> ImageDataModule:
    """The LightningDataModule of a run: data set and views, batched."""
    trainer = TrainerOptions.read(cfg.trainer)
    here = device(trainer.accelerator, strict=False)
    asked = inspect.signature(get_class(cfg.datamodule._target_)).parameters
    switches = {"compile": trainer.compile, "channels_last": trainer.channels_last}
    fast = {name: resolve_auto(choice, here) for name, choice in switches.items() if name in asked}
    made: ImageDataModule = build(cfg.datamodule, data=dataset(cfg), views=views(cfg), **fast)
    return made


def dataset(cfg: DictConfig) -> ImageData:
    """The data set, or a small part of it where the configuration limits it."""
    data: ImageData = build(cfg.dataset)
    return data if cfg.get("limit_images") is None else data.limited(cfg.limit_images)


def recipe(cfg: DictConfig) -> OptimizationRecipe:
    """Optimiser and schedules. The learning rate in the configuration is the one for the reference batch.

    A null takes away an option that the optimiser does not have: one that stood there for another optimiser.
    """
    trainer = TrainerOptions.read(cfg.trainer)
    known = inspect.signature(get_class(cfg.optimizer._target_)).parameters
    chosen = {k: v for k, v in cfg.optimizer.items() if k != "lr" and (v is not None or k in known)}
    schedules = {str(k): build(v) for k, v in cfg.schedule.items() if isinstance(v, DictConfig) and "_target_" in v}
    optimizer = build(OmegaConf.create({**chosen, "_partial_": True}))
    with as_user_error(place(cfg.optimizer)):  # it refuses values as soon as it has something to optimise
        optimizer([nn.Parameter(torch.zeros(1))], lr=float(cfg.optimizer.lr))
    return OptimizationRecipe(
        optimizer=optimizer,
        lr=float(cfg.optimizer.lr),
        schedules=schedules,
        scaling=cfg.schedule.scaling,
        reference_batch=cfg.schedule.reference_batch,
        # Lightning refuses to clip what a fused optimiser will scale back itself
        fused=device(trainer.accelerator, strict=False).type == "cuda" and not trainer.clip_norm,
    )


def method(cfg: DictConfig, data: ImageDataModule, backbone: nn.Module | None = None, **inherited: Any) -> Method:
    """The method with its backbone, which begins with the weights of the run ``cfg.start`` where one is named.

    What it `needs` to know of the images and the configuration does not say, the datamodule tells.

    Args:
        backbone, inherited: parts that come from another run.

    Raises:
        UserError: the class is no method, or needs what these data do not tell.
    """
    kind = get_class(cfg.method._target_)
    if not issubclass(kind, Method):
        raise UserError(f"{place(cfg.method)} is no method: it has to be a class below selfsight.methods.base.Method.")
    facts = {
        "num_classes": data.data.num_classes, "num_images": len(data.data.everything()), "batch_size": cfg.batch_size,
        **getattr(data, "facts", {}),
    }  # fmt: skip
    wanted = [name for name in kind.needs if name not in inherited and cfg.method.get(name) is None]
    if unknown := [name for name in wanted if name not in facts]:
        raise UserError(
            f"{kind.__name__} has to know {', '.join(unknown)}, which {type(data).__name__} does not tell; choose "
            "datamodule=semi for a method that learns from few labels, or set method.<name>."
        )
    told = {name: facts[name] for name in wanted}
    if backbone is None:
        backbone = build(cfg.backbone)
        if cfg.get("start") is not None:
            start_from(backbone, cfg.start)
    made: Method = build(cfg.method, backbone=backbone, **told, **inherited)
    return made


def length(cfg: DictConfig, module: ImageDataModule) -> Clock:
    """Lengths of the run in optimiser steps. `accumulate` batches make one step, and so do those left at the end."""
    trainer = TrainerOptions.read(cfg.trainer)
    steps = module.steps_per_epoch
    if trainer.limit_batches is not None:
        steps = min(steps, trainer.limit_batches)
    return Clock(
        examples=module.examples,
        batch_size=cfg.batch_size * trainer.accumulate,
        epochs=trainer.max_epochs,
        steps_per_epoch=max(1, math.ceil(steps / trainer.accumulate)),
    )


def describe(cfg: DictConfig) -> Description:
    """The names in a configuration. Choices are kept in it; older ones do not have them, and name their classes."""
    package, method_class = str(cfg.method._target_).rsplit(".", 1)
    return Description(
        method=package.rpartition(".")[2],
        method_class=method_class,
        backbone=str(cfg.backbone.get("name", "backbone")),
        dataset=str(cfg.dataset.name),
        backbone_arguments=resolved(cfg.backbone),
        image_size=cfg.dataset.image_size,
        batch_size=cfg.batch_size,
        epochs=cfg.trainer.max_epochs,
        seed=cfg.seed,
        settings=OmegaConf.to_yaml(cfg, resolve=True),
    )


def check(job: str, cfg: DictConfig) -> None:
    """Refuse what can be refused without data: values, devices, optimiser.

    Raises:
        UserError: see `options.check`, `devices.spread` and `recipe`.
    """
    options.check(job, cfg)
    if "trainer" in cfg:
        trainer = TrainerOptions.read(cfg.trainer)
        spread(trainer, device(trainer.accelerator), cfg.batch_size)
        recipe(cfg)


def check_views(learner: Method, data: ImageDataModule) -> None:
    """Refuse views the method cannot learn from.

    Raises:
        UserError: too few or too many views.
    """
    fewest, most = learner.n_views
    given = sum(view.count for view in data.views)
    if given < fewest or (most is not None and given > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise UserError(
            f"{type(learner).__name__} learns from {wanted} views of an image and the views chosen give {given}; "
            "set views.<name>.count or choose other views."
        )


def check_sizes(learner: Method, data: ImageDataModule) -> None:
    """Refuse views that shrink to nothing inside the backbone: tried on a copy without memory.

    Raises:
        UserError: naming the view's size.
    """
    backbone = copy.deepcopy(learner.backbone).to("meta").eval()
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


# --- nodes -----------------------------------------------------------------------------------------------------------


def build(node: Any, **extra: Any) -> Any:
    """`hydra.utils.instantiate`; what the thing configured refuses is a user's mistake, as `as_user_error` says it."""
    with as_user_error(place(node)):
        # Objects are added after Hydra is done: it would make configurations of the dataclasses among them.
        if extra:
            return instantiate(node, _convert_="all", _partial_=True)(**extra)
        return instantiate(node, _convert_="all")


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
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


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, interpolations filled in."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}
