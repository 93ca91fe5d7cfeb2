"""The one door from a configuration to the parts of a run. What goes on behind it is typed; no `DictConfig` does."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from hydra.utils import get_class, get_object
from lightning import seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from selfsight.backbones import interface
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import name_of
from selfsight.checkpoints.load import start_from
from selfsight.composition.defaults import presets_line
from selfsight.contracts import Backbone
from selfsight.datamodules import DataModule, ImageData
from selfsight.datamodules.datasets.manifest import Manifest
from selfsight.datamodules.views.view import View
from selfsight.engine import options, trackers
from selfsight.engine.advice import Plan
from selfsight.engine.checks import check_batch, check_classes, check_kind, check_sizes, check_twice, check_views
from selfsight.engine.devices import device, processes, resolve_auto, spread
from selfsight.engine.nodes import as_user_error, build, of_kind, place
from selfsight.engine.options import RunOptions, TrainerOptions, resolved
from selfsight.engine.prepared import PreparedCallback
from selfsight.engine.sizes import by_rule, length, plan
from selfsight.engine.stages import Stages
from selfsight.engine.teacher_features import TeacherFeatures
from selfsight.errors import UserError
from selfsight.evaluation import OnlineEvaluation
from selfsight.evaluation.base import Evaluator, is_evaluator
from selfsight.evaluation.probes.dims import at_dims, check_dims
from selfsight.methods.base import Method
from selfsight.methods.matryoshka import Matryoshka
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.sam import sharpness_aware
from selfsight.optim.schedule import Clock
from selfsight.runs import records
from selfsight.runs.folder import RunFolder

#: logger: (packages of which it needs one, how to install it)
LOGGERS = {
    "lightning.pytorch.loggers.TensorBoardLogger": (("tensorboard", "tensorboardX"), "'selfsight[tensorboard]'"),
    trackers.MLFLOW: (("mlflow",), "'selfsight[mlflow]'"),
}


@dataclass(frozen=True)
class Description:
    """What a run is called by, for headings and for the files that go out into the world.

    Attributes:
        method, backbone, dataset: their names. method_class: ``SwAV``.
        backbone_arguments: what the backbone is made with, ``_target_`` included.
        settings: the whole configuration as YAML.
        presets: the values that its data set and method came with, in a line.
    """

    method: str
    method_class: str
    backbone: str
    dataset: str
    backbone_arguments: Mapping[str, object]
    image_size: int
    batch_size: int
    epochs: int
    seed: int
    settings: str
    presets: str | None


@dataclass(frozen=True)
class Parts:
    """Everything a training is made of.

    Attributes:
        length: in steps, epochs and examples.
        online: evaluation while training. final: evaluators of the table at the end, by name.
        callbacks: further ones, by their order. loggers: each is called with the run folder it writes into.
        untrained: a backbone like the one that is trained, with weights of its own.
        plan: the sizes by which a run is advised; None for tries of a few batches.
    """

    datamodule: DataModule
    method: Method
    recipe: OptimizationRecipe
    length: Clock
    trainer: TrainerOptions
    run: RunOptions
    description: Description
    online: OnlineEvaluation
    final: Mapping[str, Evaluator]
    callbacks: list[Callback]
    loggers: list[Callable[[RunFolder], Logger]]
    untrained: Callable[[], nn.Module]
    plan: Plan | None


def parts(cfg: DictConfig, of: RunFolder | None = None, **inherited: nn.Module | None) -> Parts:
    """The parts of a training, from a seed that its configuration names.

    Args:
        of: the run whose images these are, where one has begun with them, see `dataset`.
        inherited: arguments of the method that come from another run: a trained ``backbone``, a ``projector``, a
            ``teacher``.

    Raises:
        UserError: a value that cannot be meant, or parts that do not go together.
    """
    run, trainer = RunOptions.read(cfg), TrainerOptions.read(cfg.trainer)
    where = device(trainer.accelerator)
    spread(trainer, where, run.batch_size)
    seed_everything(run.seed, workers=True, verbose=False)
    data = datamodule(cfg, of)
    learner = method(cfg, data, **inherited)
    if cfg.get("batches") is not None:
        stages: Stages = build(cfg.batches)
        stages.arrange(learner, data, where)
    check_views(learner, data)
    check_sizes(learner, data)
    check_batch(learner, data, processes(trainer, where))
    made, clock = recipe(cfg), length(cfg, data)
    final = {str(name): evaluator(node) for name, node in (cfg.evaluator.get("final") or {}).items()}
    chosen = callbacks(cfg)
    if learner.shown_once(plain=False) != "":
        chosen.append(TeacherFeatures())
    for one in chosen:
        if isinstance(one, PreparedCallback):
            one.prepare(learner, data, clock, graphs=trainer.cuda_graphs)
    loggers = [node for node in (cfg.get("logger") or {}).values() if isinstance(node, DictConfig)]  # null: no such key
    return Parts(
        datamodule=data,
        method=learner,
        recipe=made,
        length=clock,
        trainer=replace(trainer, max_epochs=math.ceil(clock.epochs)),
        run=run,
        description=describe(cfg, data.dataset.channels),
        online=online(cfg.evaluator.online),
        final=of_features(final, learner),
        callbacks=chosen,
        loggers=[logger(node) for node in loggers],
        untrained=partial(network, cfg, data.dataset.channels),
        plan=plan(cfg, data, clock) if trainer.limit_batches is None else None,
    )


# --- single parts ----------------------------------------------------------------------------------------------------


def callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of a person's choosing, in their order.

    Raises:
        UserError: one is none.
    """
    nodes = (cfg.get("callbacks") or {}).values()
    return [of_kind(build(node), Callback, place(node), "a callback of lightning.pytorch") for node in nodes]


def of_features(evaluators: Mapping[str, Evaluator], learner: Method) -> dict[str, Evaluator]:
    """Evaluators of what a method learns; of nested dimensions they look at each, where they can.

    Raises:
        UserError: one is to look at more features than there are.
    """
    made = {name: at_dims(one, learner.prefixes or None) for name, one in evaluators.items()}
    for one in made.values():
        check_dims(one, learner.backbone.num_features)  # type: ignore[arg-type]
    return made


def views(cfg: DictConfig) -> dict[str, View]:
    """The views by name, in their order in a batch.

    Raises:
        UserError: one is no view, such as the values of a preset for other views than those chosen.
    """
    made = {str(name): build(node) for name, node in cfg.views.items() if name != "engine"}
    for name, view in made.items():
        if not isinstance(view, View):
            hint = (
                "; presets=null leaves out values that are for other views"
                if OmegaConf.select(cfg, "choices.presets")
                else ""
            )
            raise UserError(
                f"views.{name} is no view: views.{name}._target_=selfsight.datamodules.views.View makes it one, "
                f"~views.{name} leaves it out{hint}.",
                status=2,
            )
    return made


def datamodule(cfg: DictConfig, of: RunFolder | None = None) -> DataModule:
    """The LightningDataModule of a run: data set and views, batched; ``of`` a run that has begun, see `dataset`."""
    trainer = TrainerOptions.read(cfg.trainer)
    here = device(trainer.accelerator, strict=False)
    asked = inspect.signature(get_class(cfg.datamodule._target_)).parameters
    switches = {"compile": trainer.compile, "channels_last": trainer.channels_last}
    fast = {name: resolve_auto(choice, here) for name, choice in switches.items() if name in asked}
    data, described = dataset(cfg, of), views(cfg)
    if data.bands is not None:  # a recipe's mean and std are of other images
        described = {
            name: replace(view, mean=tuple(data.mean), std=tuple(data.std)) for name, view in described.items()
        }
    made: DataModule = build(cfg.datamodule, data=data, views=described, **fast)
    return made


def dataset(cfg: DictConfig, of: RunFolder | None = None) -> ImageData:
    """The data set, or a small part of it where the configuration limits it.

    With ``of``, a run that has begun or ended, it is the one of then, see `as_of_run`.
    """
    data: ImageData = of_kind(
        build(cfg.dataset), ImageData, place(cfg.dataset), "an ImageData, as data sets by name are,"
    )
    data = data if of is None else as_of_run(data, cfg.dataset, of)
    return data if cfg.get("limit_images") is None else data.limited(cfg.limit_images)


def evaluator(node: DictConfig) -> Evaluator:
    """A single evaluator.

    Raises:
        UserError: it is none.
    """
    made: Evaluator = build(node)
    if not is_evaluator(made):
        raise UserError(
            f"{place(node)} is no evaluator; a function of the features, evaluator(train, test), or an object with "
            "on_images(backbone, data) was expected.",
            status=2,
        )
    return made


def online(node: DictConfig) -> OnlineEvaluation:
    """The evaluation while training.

    Raises:
        UserError: one of its evaluators is none.
    """
    for one in (node.get("evaluators") or {}).values():
        if isinstance(one, DictConfig):
            evaluator(one)
    return of_kind(build(node), OnlineEvaluation, place(node), "an OnlineEvaluation")


def logger(node: DictConfig) -> Callable[[RunFolder], Logger]:
    """A logger that is made once there is a folder for it. A run keeps its id there, however often it is resumed.

    Raises:
        UserError: it takes a package that is not installed.
    """
    packages, name = LOGGERS.get(str(node.get("_target_")), ((), ""))
    if packages and not any(map(find_spec, packages)):
        raise UserError(f"logger={packages[0]} needs a package: pip install {name}.")

    def made(folder: RunFolder) -> Logger:
        return trackers.opened(
            str(node.get("_target_")), resolved(node), folder, partial(build, node, save_dir=str(folder.path))
        )

    return made


#: values of a data set that do not say which images there are
PRESENTATION = ("name", "image_size", "eval_resize", "mean", "std", "resident", "max_unreadable", "max_pixels")


def as_of_run(data: ImageData, node: DictConfig, folder: RunFolder) -> ImageData:
    """The data set of a run as it was when the run began: its images, their split, classes and labels.

    Another data set, or another split of it, stays as it is; what of its test images the run has learned from is told.
    """

    def choice(chosen: DictConfig) -> dict[str, object]:
        return {key: value for key, value in resolved(chosen).items() if key not in PRESENTATION}

    recorded = Manifest.read(folder.data)
    if recorded is None:
        return data
    if choice(node) == choice(folder.config().dataset):
        return data.as_recorded(recorded)
    data.warn_of_trained(recorded)
    return data


def recipe(cfg: DictConfig) -> OptimizationRecipe:
    """Optimiser and schedules. The learning rate in the configuration is the one for the reference batch.

    Raises:
        UserError: values that the optimiser refuses, or SAM with what gives it no second gradient.
    """
    trainer = TrainerOptions.read(cfg.trainer)
    schedules = {str(k): build(v) for k, v in cfg.schedule.items() if isinstance(v, DictConfig) and "_target_" in v}
    made = optimizer(cfg.optimizer)
    with as_user_error(place(cfg.optimizer)):  # it refuses values as soon as it has something to optimise
        made([nn.Parameter(torch.zeros(1))], lr=float(cfg.optimizer.lr))
    if (sam := cfg.optimizer.get("sam")) is not None:
        check_twice(f"optimizer.sam={sam}", trainer)
    return OptimizationRecipe(
        optimizer=made,
        lr=float(cfg.optimizer.lr),
        schedules=schedules,
        scaling=cfg.schedule.scaling,
        reference_batch=cfg.schedule.reference_batch,
        # Lightning refuses to clip what a fused optimiser will scale back itself
        fused=device(trainer.accelerator, strict=False).type == "cuda" and not trainer.clip_norm,
    )


def optimizer(node: DictConfig) -> Callable[..., Optimizer]:
    """What makes an optimiser of groups of parameters, with SAM around it where ``sam`` says so.

    A null takes away an option that the optimiser does not have: one that stood there for another optimiser.
    """
    around = {name for name, p in inspect.signature(sharpness_aware).parameters.items() if p.kind is p.KEYWORD_ONLY}
    known = inspect.signature(get_class(node._target_)).parameters
    own = {k: v for k, v in node.items() if k not in around - {*known} and (v is not None or k in known)}
    return sharpness_aware(
        build(OmegaConf.create({**own, "_partial_": True})), **{k: node[k] for k in around if k in node}
    )


def network(cfg: DictConfig, channels: int = 3) -> Backbone:
    """The backbone of a run, built for its images; any module of a person's own is made one (`interface.wrap`).

    Args:
        channels: of the images.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.backbone = backbone_arguments(cfg, channels)
    with as_user_error(place(cfg.backbone)):
        return interface.wrap(build(cfg.backbone), image_size=cfg.dataset.image_size, in_chans=channels)


def backbone_arguments(cfg: DictConfig, channels: int = 3) -> dict[str, object]:
    """What the network of a run is made with, ``_target_`` included.

    That is the configuration's node, with size and channels of the images where the constructor asks for them. Where a
    person's own ``_target_`` has taken the place of the one chosen, the values of that choice that it does not know go.
    """
    node = resolved(cfg.backbone)
    with as_user_error(place(cfg.backbone)):
        target = get_object(str(node["_target_"]))
        takes = inspect.signature(target).parameters
    if target is not create:
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        of_create = inspect.signature(create).parameters
        node = {
            name: value
            for name, value in node.items()
            if name.startswith("_") or name in takes or (open_ended and name not in of_create)
        }
    if "image_size" in takes and node.get("image_size") is None:
        node["image_size"] = cfg.dataset.image_size
    if "in_chans" in takes and node.get("in_chans", 3) == 3:  # the default, which is for RGB
        node["in_chans"] = channels
    return node


def method(
    cfg: DictConfig, data: DataModule, backbone: nn.Module | None = None, **inherited: nn.Module | None
) -> Method:
    """The method with its backbone, which begins with the weights of the run ``cfg.init_from`` where one is named.

    What it `needs` to know of the images and the configuration does not say, the datamodule tells.

    Args:
        backbone, inherited: parts that come from another run.

    Raises:
        UserError: the class is no method, or needs what these data do not tell.
    """
    kind: type[Method] = get_class(cfg.method._target_)
    if not issubclass(kind, Method):
        raise UserError(f"{place(cfg.method)} is no method: it has to be a class below selfsight.methods.base.Method.")
    facts = {"batch_size": cfg.batch_size, **data.facts}
    wanted = [name for name in kind.needs if name not in inherited and cfg.method.get(name) is None]
    if unknown := [name for name in wanted if name not in facts]:
        raise UserError(
            f"{kind.__name__} has to know {', '.join(unknown)}, which {type(data).__name__} does not tell; choose "
            "datamodule=semi for a method that learns from few labels, or set method.<name>."
        )
    told = {name: facts[name] for name in wanted}
    check_kind(kind, data)
    check_classes(kind, data)
    if backbone is None:
        backbone = network(cfg, data.dataset.channels)
        if (source := cfg.get("init_from", cfg.get("start"))) is not None:  # older runs call it start
            start_from(backbone, source)
    made: Method = build(cfg.method, backbone=backbone, **told, **inherited)
    heads: Matryoshka | None = None if cfg.get("heads") is None else build(cfg.heads)
    return made if heads is None else heads.on(made)


def describe(cfg: DictConfig, channels: int = 3) -> Description:
    """The names in a configuration. Choices are kept in it; older ones do not have them, and name their classes.

    Args:
        channels: of the images.
    """
    package, method_class = str(cfg.method._target_).rsplit(".", 1)
    choice = str(OmegaConf.select(cfg, "choices.method") or package.rpartition(".")[2])
    arguments = backbone_arguments(cfg, channels)
    return Description(
        method=method_class.lower() if "." in choice else choice,
        method_class=method_class,
        backbone=name_of(arguments),
        dataset=records.data_name(cfg.dataset),
        backbone_arguments=arguments,
        image_size=cfg.dataset.image_size,
        batch_size=cfg.batch_size,
        epochs=cfg.trainer.max_epochs,
        seed=cfg.seed,
        settings=OmegaConf.to_yaml(cfg, resolve=True),
        presets=presets_line(cfg),
    )


def check(job: str, cfg: DictConfig) -> None:
    """Refuse what can be refused without data: values, devices, optimiser.

    Raises:
        UserError: see `options.check`, `devices.spread` and `recipe`.
    """
    options.check(job, cfg)
    cfg = options.settled(cfg)
    if "trainer" in cfg:
        trainer = TrainerOptions.read(cfg.trainer)
        spread(trainer, device(trainer.accelerator), cfg.batch_size)
        recipe(cfg)


def sized(cfg: DictConfig) -> DictConfig:
    """The configuration with sizes that are ``auto`` by the number of images, see `sizes.by_rule`."""
    return by_rule(cfg, lambda: dataset(cfg).num_images)
