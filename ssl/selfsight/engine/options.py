"""What values have to be over which a library would fail later, or not at all: asked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.validation import AUTO, AUTO_SWITCH, NULL, Kind, above, at_least, each, expect, one_of, whole

#: Lightning's others would give the weights a type that images do not have
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")


def is_folder_name(value: Any) -> bool:
    text = "" if value is None else str(value)
    return not {"/", "\\"} & set(text) and text not in (".", "..")


GPUS = Kind("a list of GPUs such as [0,1]", lambda v: each(whole(0)).fits(v) and len({*v}) == len(v))

EXPECTED: Mapping[str, Kind] = {
    "name": Kind("a folder's name without '/' (runs=DIR says where it is kept)", is_folder_name),
    "runs": Kind("a folder", lambda value: value is not None),
    "seed": whole(0, 2**32 - 1),
    "batch_size": whole(1),
    "num_workers": AUTO | whole(0),
    "limit_images": NULL | whole(1),
    "mu": whole(1),
    "steps_per_epoch": NULL | whole(1),
    "layer": AUTO | whole(0),
    "trainer.max_epochs": whole(1),
    "trainer.devices": AUTO | whole(1) | GPUS,
    "trainer.num_nodes": whole(1),
    "trainer.precision": one_of(*PRECISIONS),
    "trainer.compile": AUTO_SWITCH,
    "trainer.channels_last": AUTO_SWITCH,
    "trainer.sync_batchnorm": AUTO_SWITCH,
    "trainer.accumulate": whole(1),
    "trainer.clip_norm": NULL | above(0),
    "trainer.limit_batches": NULL | whole(1),
    "trainer.checkpoint_every": whole(1),
    "optimizer.lr": at_least(0),
    "optimizer.weight_decay": NULL | at_least(0),
    "schedule.reference_batch": whole(1),
    "evaluator.online.every": whole(1),
}
OF_JOB: Mapping[str, Mapping[str, Kind]] = {
    "profile": {"steps": whole(1), "warmup": whole(0)},
    "compare": {"seeds": whole(1), "workers": AUTO | whole(1), "labels_per_class": each(whole(1))},
}


def check(job: str, cfg: DictConfig) -> None:
    """Refuse values of a job's configuration that cannot be meant; of one that trains, devices and optimiser, too.

    Raises:
        UserError: see `expect`.
    """
    for key, kind in {**EXPECTED, **OF_JOB.get(job, {})}.items():
        parent, _, leaf = key.rpartition(".")
        holder = OmegaConf.select(cfg, parent) if parent else cfg
        if isinstance(holder, DictConfig) and leaf in holder:
            expect(key, holder[leaf], kind)
    if "trainer" in cfg:
        from selfsight.engine import build, devices

        devices.spread(cfg.trainer, build.device(cfg.trainer.accelerator), cfg.batch_size)
        build.recipe(cfg)
