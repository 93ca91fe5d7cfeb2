"""How a run is spread over devices, and BatchNorm that looks at all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.backbones import timm
from selfsight.engine.options import ACCELERATORS, TrainerOptions
from selfsight.errors import UserError
from selfsight.nn.batchnorm import ReducedBatchNorm
from selfsight.runs.processes import started_by_torchrun
from selfsight.validation import expect, one_of


class Spread(NamedTuple):
    """Devices a node, nodes, Lightning's strategy, and plugins that go with it."""

    devices: int | list[int]
    nodes: int
    strategy: str
    plugins: list[LayerSync]


def device(name: str, *, strict: bool = True) -> torch.device:
    """``auto``, ``cpu``, ``gpu`` or ``cuda`` as a device.

    Raises:
        UserError: another word, or a GPU was asked for and there is none; without ``strict`` it is the CPU then.
    """
    expect("accelerator", name, one_of(*ACCELERATORS))
    if strict and name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={name} asks for a GPU and PyTorch sees none; use trainer.accelerator=cpu or auto."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def resolve_auto(choice: bool | str, where: torch.device) -> bool:
    """A switch of the trainer: true, false, or ``auto``: on a GPU."""
    return where.type == "cuda" if choice == "auto" else bool(choice)


def processes(options: TrainerOptions, where: torch.device) -> int:
    """How many processes ``trainer.devices`` and ``num_nodes`` come to: one for each device.

    Raises:
        UserError: torchrun has started others.
    """
    return _count(devices_of(options, where)) * nodes_of(options)


def _count(devices: int | list[int]) -> int:
    return devices if isinstance(devices, int) else len(devices)


def nodes_of(options: TrainerOptions) -> int:
    started = started_by_torchrun()
    return options.num_nodes if started is None else started[1]


def devices_of(options: TrainerOptions, where: torch.device) -> int | list[int]:
    if (started := started_by_torchrun()) is not None:
        if options.devices == "auto":
            return started[0]
        if (asked := _count(options.devices)) != started[0]:  # type: ignore[arg-type]
            raise UserError(
                f"torchrun has started {started[0]} processes on this machine, and trainer.devices asks for {asked}; "
                f"give trainer.devices={started[0]}, or torchrun --nproc-per-node={asked}."
            )
    if options.devices == "auto":
        return torch.cuda.device_count() if where.type == "cuda" else 1
    return options.devices  # type: ignore[return-value]  # of words only auto is let in


def spread(options: TrainerOptions, where: torch.device, batch_size: int) -> Spread:
    """What ``trainer.devices``, ``num_nodes``, ``strategy`` and ``sync_batchnorm`` come to on ``where``.

    Where torchrun has started the processes they are those.

    Raises:
        UserError: a batch that does not give each device as many images, or GPUs by number where there are none.
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
    strategy = "ddp" if options.strategy == "auto" and count > 1 else options.strategy
    sync = options.sync_batchnorm
    if sync == "auto":
        sync = count > 1 and where.type == "cuda"  # on CPUs it is slower than all that it normalises
    return Spread(devices, nodes_of(options), strategy, [SyncNorms(where.type)] if sync else [])


class SyncNorms(LayerSync):
    """BatchNorm over the images of all processes while training; afterwards every norm is what it was before.

    Lightning's own conversion would drop the activations that timm keeps inside its norms, there and back. PyTorch's
    layer is one for GPUs; on CPUs ours takes its place.
    """

    def __init__(self, kind: str = "cuda") -> None:
        self.kind = kind
        self.before: dict[str, _BatchNorm] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        found = model.named_modules(remove_duplicate=False)
        self.before = {name: norm for name, norm in found if isinstance(norm, _BatchNorm)}
        if self.kind == "cuda":
            converted: nn.Module = timm.layers.convert_sync_batchnorm(model)
            return converted
        for name, norm in self.before.items():
            put_in_place(model, name, ReducedBatchNorm(norm))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for name, norm in self.before.items():
            synced = model.get_submodule(name)
            for key in (*norm._parameters, *norm._buffers):
                setattr(norm, key, getattr(synced, key))
            put_in_place(model, name, norm.train(synced.training))
        return model


def put_in_place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let ``module`` stand where ``model`` has another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
