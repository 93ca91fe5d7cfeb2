"""How a run is spread over devices, and BatchNorm that looks at all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from omegaconf import DictConfig
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.errors import UserError, nearest

#: each process is the command started again; what would be handed to forked or spawned ones cannot all be pickled
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


class Spread(NamedTuple):
    """Devices a node, Lightning's strategy, and plugins that go with it."""

    devices: Any
    strategy: str
    plugins: list[LayerSync]


def processes(options: DictConfig, where: torch.device) -> int:
    """How many processes ``trainer.devices`` and ``num_nodes`` come to: one for each device."""
    devices = devices_of(options, where)
    return (devices if isinstance(devices, int) else len(devices)) * int(options.num_nodes)


def devices_of(options: DictConfig, where: torch.device) -> Any:
    if options.devices == "auto":
        return torch.cuda.device_count() if where.type == "cuda" else 1
    return options.devices


def spread(options: DictConfig, where: torch.device, batch_size: int) -> Spread:
    """What ``trainer.devices``, ``num_nodes``, ``strategy`` and ``sync_batchnorm`` come to on ``where``.

    Raises:
        UserError: a batch that does not give each device as many images, GPUs by number where there are none, an
            unknown strategy, or one that cuts parameters into pieces.
    """
    devices, count = devices_of(options, where), processes(options, where)
    if not isinstance(devices, int) and where.type == "cpu":
        raise UserError(
            f"trainer.devices={options.devices} names GPUs and this run computes on the CPU; give a number."
        )
    if count > batch_size:
        raise UserError(
            f"{count} devices were asked for and batch_size is {batch_size}: each device needs an image or "
            "more; choose fewer devices (trainer.devices=) or a larger batch_size."
        )
    if batch_size % count:
        raise UserError(
            f"batch_size is {batch_size} over all devices and there are {count}; choose a multiple of {count}."
        )
    strategy = str(options.strategy)
    if any(word in strategy for word in ("fsdp", "deepspeed", "parallel")):
        raise UserError(
            f"trainer.strategy={strategy} cuts parameters into pieces, and weight decay, layer-wise rates and averaged "
            "networks need them whole; use ddp, with trainer.checkpoint_activations=true where memory is short."
        )
    if strategy not in STRATEGIES:
        raise UserError(
            f"trainer.strategy is '{strategy}'; one of {', '.join(STRATEGIES)} was expected."
            f"{nearest(strategy, STRATEGIES)}"
        )
    if strategy == "auto" and count > 1:
        strategy = "ddp"
    sync = options.sync_batchnorm
    if sync == "auto":
        sync = count > 1 and where.type == "cuda"  # PyTorch has no synchronised BatchNorm for CPUs
    return Spread(devices, strategy, [SyncNorms()] if sync else [])


class SyncNorms(LayerSync):
    """BatchNorm over the images of all processes while training; afterwards every norm is what it was before.

    Lightning's own conversion would drop the activations that timm keeps inside its norms, there and back.
    """

    def __init__(self) -> None:
        self.before: dict[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        found = model.named_modules(remove_duplicate=False)
        self.before = {name: norm for name, norm in found if isinstance(norm, _BatchNorm)}
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        for name, norm in self.before.items():
            synced = model.get_submodule(name)
            for key in (*norm._parameters, *norm._buffers):
                setattr(norm, key, getattr(synced, key))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm.train(synced.training))
        return model
