"""What a training takes over from another run: its data set, network, views, and the weights it goes on from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from selfsight.backbones.interface import channels
from selfsight.checkpoints.load import load
from selfsight.engine import build
from selfsight.engine.checkpointing import training_checkpoint
from selfsight.engine.reload import classifier_of, projection_head
from selfsight.errors import UserError, nearest
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.runs.folder import RunFolder

SELF = "self"  #: a student like its teacher
#: of transformers, on every token before one is taken as the feature, or on the mean of the patches
LAST_NORMS = ("norm.", "fc_norm.")


def completed_for_finetuning(
    cfg: DictConfig, *, again: bool = False
) -> tuple[DictConfig, nn.Module, ProjectionHead | None]:
    """A fine-tuning's configuration with what it leaves open filled in, its backbone and its projection head.

    From the run ``cfg.run``: ``dataset`` and ``backbone`` (values given for them alone stay) and, where null, the
    crop's scale and the flip of the views: what was the same image to pretraining is the same image here.

    Args:
        again: it has been completed before, by a run that was stopped at its very beginning.

    Raises:
        UserError: neither a run nor a network with a data set is named, or both.
    """
    cfg = _open_copy(cfg)
    if cfg.run is None:
        if not (names_something(cfg.get("backbone")) and names_something(cfg.get("dataset"))):
            raise UserError("give a run to fine-tune (run=runs/NAME), or backbone= and dataset= to start from scratch.")
        fill_views(cfg, OmegaConf.create({}))
        backbone, projector = build.network(cfg, build.dataset(cfg).channels), None
    else:
        source = RunFolder.open(cfg.run)
        trained = load(source.path)
        if names_something(cfg.get("backbone")) and not again:
            raise UserError(
                f"the network is that of '{source.path}': leave out backbone=, or run= to start from scratch."
            )
        spec: Any = trained.spec
        of_spec = {"_target_": "selfsight.backbones.registry.create", **spec["backbone"], "pretrained": False}
        cfg.backbone = chosen_or_inherited(cfg.get("backbone"), OmegaConf.create(of_spec))
        cfg.dataset = chosen_or_inherited(cfg.get("dataset"), source.config().dataset)
        fill_views(cfg, source.config().views)
        backbone = build.network(cfg, channels(trained))
        state, own = trained.state_dict(), backbone.state_dict()
        if cfg.backbone.get("pool") != spec["backbone"].get("pool"):  # it ends with another norm then, which is fresh
            state = {name: value for name, value in state.items() if name in own or not name.startswith(LAST_NORMS)}
            state |= {name: own[name] for name in own if name not in state and name.startswith(LAST_NORMS)}
        backbone.load_state_dict(state)
        state = training_checkpoint(source.checkpoint)["state_dict"] if source.checkpoint.is_file() else {}
        projector = projection_head(state)
    if cfg.method.layer == "auto":
        cfg.method.layer = 1 if projector is not None else 0
    return cfg, backbone, projector


def completed_for_distillation(cfg: DictConfig, student: DictConfig | None) -> tuple[DictConfig, nn.Module, list[str]]:
    """A distillation's configuration, what it leaves open filled in from its teacher's run; the teacher; its classes.

    Args:
        student: the backbone that the configuration names; None for one like the teacher's.
    """
    cfg, source = _open_copy(cfg), RunFolder.open(cfg.teacher)
    network, classes = classifier_of(source)
    of_teacher = source.config()
    if cfg.get("backbone") is None:
        cfg.backbone = of_teacher.backbone if student is None else student
    cfg.dataset = chosen_or_inherited(cfg.get("dataset"), of_teacher.dataset)
    if cfg.method.temperature == "auto":
        cfg.method.temperature = 0.1 if cfg.student == SELF else 1.0
    amounts = ("per_class", "total", "fraction", "list", "split")
    if cfg.labels.rule != "all" and all(cfg.labels.get(key) is None for key in amounts):
        cfg.labels.split = str(source.labels)
    fill_views(cfg, of_teacher.views)
    return cfg, network, classes


def check_classes(teacher: Sequence[str], student: Sequence[str], name: str) -> None:
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


def names_something(node: DictConfig | None) -> bool:
    """Whether a node says what it describes, and not only with which values."""
    return node is not None and "_target_" in node


def chosen_or_inherited(node: DictConfig | None, inherited: DictConfig) -> DictConfig:
    """A node that names a data set or network as it is; else the inherited one, with the node's values in it.

    So ``dataset.eval_resize`` or ``backbone.drop_path`` alone change what the run before had.

    Raises:
        UserError: a value that this data set or network does not take.
    """
    if node is None or names_something(node):
        return node or inherited
    taken = inspect.signature(get_object(inherited._target_)).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in taken.values()):
        for key in (str(key) for key in node if key not in taken and key not in inherited):
            raise UserError(
                f"{key}={node[key]} was given for '{inherited.get('name')}', which takes no such value; it takes "
                f"{', '.join(taken)}.{nearest(key, taken)}"
            )
    both = OmegaConf.merge(inherited, node)
    assert isinstance(both, DictConfig)
    return both


def fill_views(cfg: DictConfig, pretrained_with: DictConfig) -> None:
    """Fill the places the views leave open (null) as the first view of pretraining has them."""
    first = next((view for view in pretrained_with.values() if isinstance(view, DictConfig)), OmegaConf.create({}))
    for view in (view for view in cfg.views.values() if isinstance(view, DictConfig)):
        for key, otherwise in (("scale", [0.08, 1.0]), ("hflip", 0.5)):
            if key in view and view[key] is None:
                view[key] = first.get(key, otherwise)


def _open_copy(cfg: DictConfig) -> DictConfig:
    """A copy that takes new keys; the configuration itself stays as it was composed."""
    copied = cfg.copy()
    OmegaConf.set_struct(copied, False)
    return copied
