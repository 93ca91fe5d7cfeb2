"""The sizes of a run: its length in steps, those that are ``auto``, and what its plan of sizes is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from selfsight.composition.defaults import stated
from selfsight.datamodules import DataModule, SemiDataModule
from selfsight.engine import advice, options
from selfsight.engine.advice import Plan
from selfsight.engine.options import TrainerOptions, resolved
from selfsight.optim.schedule import Clock


def length(cfg: DictConfig, module: DataModule) -> Clock:
    """Lengths of the run in optimiser steps. `accumulate` batches make one step, and so do those left at the end.

    ``trainer.max_steps``, where it is given, is the length in place of ``trainer.max_epochs``.
    """
    trainer = TrainerOptions.read(cfg.trainer)
    steps = module.steps_per_epoch
    if trainer.limit_batches is not None:
        steps = min(steps, trainer.limit_batches)
    steps = max(1, math.ceil(steps / trainer.accumulate))
    return Clock(
        examples=module.examples,
        batch_size=cfg.batch_size * trainer.accumulate,
        epochs=trainer.max_epochs if trainer.max_steps is None else trainer.max_steps / steps,
        steps_per_epoch=steps,
        total=trainer.max_steps,
    )


def plan(cfg: DictConfig, data: DataModule, clock: Clock) -> Plan:
    """The sizes of a run, as rules of thumb judge them."""
    few = isinstance(data, SemiDataModule)
    warmup = OmegaConf.select(cfg, "schedule.lr.warmup_epochs")
    return Plan(
        images=len((data.unlabelled if isinstance(data, SemiDataModule) else data).images),
        batch=clock.batch_size,
        steps_per_epoch=clock.steps_per_epoch,
        steps=clock.total_steps,
        epochs=clock.epochs,
        warmup_epochs=float(warmup or 0),
        shared=not few and cfg.trainer.accumulate == 1,
        in_steps=cfg.trainer.max_steps is not None,
        settings=resolved(cfg.method),
    )


def by_rule(cfg: DictConfig, count: Callable[[], int]) -> DictConfig:
    """A configuration whose sizes that are ``auto`` follow from the number of images, see `engine.advice`.

    With ``recipe=small`` so do sizes of the method that nobody has set.

    Args:
        count: tells the number of images; asked only where it is needed, since it opens the data set.
    """
    wanted = [key for key in options.BY_RULE if OmegaConf.select(cfg, key) == "auto"]
    small = OmegaConf.select(cfg, "choices.recipe") == "small"
    if not wanted and not small:
        return cfg
    images, cfg = count(), cfg.copy()
    for key in wanted:
        OmegaConf.update(cfg, key, advice.value_by_rule(key, expected_plan(cfg, images)))
    for found in advice.advise(expected_plan(cfg, images)) if small else ():
        for key, value in found.values.items():
            group, _, name = key.partition(".")
            if group == "method" and name not in stated(cfg.method):
                cfg.method[name] = value
    return cfg


def expected_plan(cfg: DictConfig, images: int) -> Plan:
    """The sizes of a run before its parts are made; those that are ``auto`` count as 1."""
    sizes = options.settled(cfg)
    batch = sizes.batch_size * (1 if cfg.get("mu") is None else cfg.mu)
    steps = sizes.get("steps_per_epoch") or max(1, images // batch)
    return Plan(
        images=images,
        batch=batch,
        steps_per_epoch=steps,
        steps=sizes.trainer.max_steps or steps * sizes.trainer.max_epochs,
        epochs=sizes.trainer.max_epochs,
        warmup_epochs=float(OmegaConf.select(sizes, "schedule.lr.warmup_epochs") or 0),
        shared=cfg.get("mu") is None,
        settings=resolved(cfg.method),
    )
