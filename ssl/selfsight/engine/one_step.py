"""Whether a network learns by a method, told by one step of it on a few images."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from selfsight.backbones.families import Family
from selfsight.backbones.interface import check_sizes, feature_map, one_line
from selfsight.backbones.registry import create
from selfsight.composition.overrides import compose
from selfsight.contracts import Backbone, Batch, SemiBatch
from selfsight.datamodules import DataModule
from selfsight.engine import build, checks
from selfsight.engine.sizes import length
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.nn.memory_format import to_channels_last
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

#: words that a method needs besides: small views of half the side, some labels
EXTRA = {"swav": ["views.local.size=0.5"], "simmatchv2": ["labels.per_class=1", "datamodule.mu=1"]}
#: sides of the images that are tried, until the network takes them and its last map has more than one cell
SIDES = (32, 64, 96, 56, 128, 160, 192, 224, 256)
LARGEST = 120e6  # parameters; more do not take a step in the time and memory that all the others need


class Setting(NamedTuple):
    """What a method takes its step on."""

    cfg: DictConfig
    data: DataModule
    recipe: OptimizationRecipe
    length: Clock
    batch: Batch | SemiBatch


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        parameters: of the smallest member. side: of the images of the step; None where no size will do.
        several: it takes images of half that side, too.
        refusals: by method, why its step did not go through; empty where it did.
    """

    family: Family
    parameters: int
    side: int | None
    several: bool
    refusals: Mapping[str, str]


def tried(family: Family, methods: Iterable[str]) -> Row:
    """A step of each method with the family's smallest member."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create(family.smallest).parameters())
    if parameters > LARGEST:
        reason = f"was not tried: its smallest member has {parameters / 1e6:.0f} million parameters"
        return Row(family, parameters, None, False, dict.fromkeys(methods, reason))
    side, reason = smallest_side(family.smallest)
    if side is None:
        return Row(family, parameters, None, False, dict.fromkeys(methods, reason))
    torch.manual_seed(0)
    net = create(family.smallest, image_size=side)
    kind = re.compile(rf"\b(?:an? )?{type(net).__name__}\b")
    refusals = {method: kind.sub("the network", refusal(method, net, side)) for method in methods}
    return Row(family, parameters, side, takes(net, side // 2), refusals)


def smallest_side(name: str) -> tuple[int | None, str]:
    """The first of `SIDES` that a network takes, if possible with more than one cell in its map; None, and why not."""
    reason, fits = "", None
    for side in SIDES:
        try:
            with torch.device("meta"):
                net = create(name, image_size=side).eval()
                check_sizes(net, [side])
                cells = _cells(net, side)
        except UserError as error:
            reason = str(error)
            continue
        fits = fits or side
        if cells > 1:
            return side, ""
    return fits, "" if fits else reason


def _cells(net: Backbone, side: int) -> int:
    try:
        return feature_map(net, torch.empty(1, 3, side, side)).shape[2:].numel()
    except UserError:  # it has no map, and so none that is too small
        return 2


def takes(net: Backbone, side: int) -> bool:
    try:
        check_sizes(net, [side])
    except UserError:
        return False
    return True


def refusal(method: str, net: Backbone, side: int) -> str:
    """Why a method cannot take a step with a copy of a network; empty where it can."""
    try:
        at = setting(method, side)
        learner = build.method(at.cfg, at.data, backbone=copy.deepcopy(net))
        if any(view.size != side for view in at.data.views):  # that it takes this side is known
            checks.check_sizes(learner, at.data)
        learner.configure(at.recipe, at.length)
        to_channels_last(learner, torch.device("cpu"))  # as in a run, whose views are so, too
        step(learner, at.batch)
        return "" if moved(net, learner.backbone) else "the network stays as it was"
    except UserError as error:
        return str(error)
    except Exception as error:  # the table says what fails, whatever it is
        return f"fails: {type(error).__name__}: {one_line(error)}"


@functools.cache
def setting(method: str, side: int) -> Setting:
    """A method's own configuration, and a small batch of digits of that side; of two sizes for multi-crop."""
    words = [f"method={method}", "dataset=digits", f"dataset.image_size={side}", "debug=smoke", "batch_size=2"]
    words += EXTRA.get(method, [])
    cfg = compose("pretrain", words)
    data = build.datamodule(cfg)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    return Setting(cfg, data, build.recipe(cfg), length(cfg, data), batch)


def step(learner: Method, batch: Batch | SemiBatch) -> None:
    """What a trainer does in its second step, when schedules have begun; by plain gradient descent.

    Raises:
        UserError: the loss is not finite.
    """
    learner.train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)
    learner.begin_step(1)
    loss = learner.training_step(batch, 0)["loss"]
    if not bool(loss.isfinite()):
        raise UserError("its loss is not finite")
    loss.backward()
    learner.on_after_backward()
    optimizer.step()
    learner.end_step()


def moved(before: nn.Module, after: nn.Module) -> bool:
    """Whether a step has changed any weight of a network."""
    weights = dict(before.named_parameters())
    return any(not torch.equal(weights[name], p) for name, p in after.named_parameters() if name in weights)
