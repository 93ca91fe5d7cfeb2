"""What makes a training step faster and changes nothing of what is learned."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from selfsight.errors import UserError
from selfsight.methods.base import Method

log = logging.getLogger("selfsight")


def wanted(choice: bool | str, device: torch.device) -> bool:
    """A switch of the trainer: true, false, or ``auto``: on a GPU."""
    return device.type == "cuda" if choice == "auto" else bool(choice)


def quicken(method: Method, trainer: DictConfig, device: torch.device) -> Method:
    """Memory format, compiled networks and activation checkpointing as the configuration asks; returns the method.

    Raises:
        UserError: activation checkpointing for a backbone that cannot do it.
    """
    if trainer.get("checkpoint_activations"):
        turn_on = getattr(method.backbone, "set_grad_checkpointing", None)
        if turn_on is None:
            raise UserError(
                f"the backbone {type(method.backbone).__name__} cannot recompute activations; "
                "leave trainer.checkpoint_activations=false or choose one of timm's."
            )
        turn_on(True)
    if wanted(trainer.channels_last, device):
        method.to(memory_format=torch.channels_last)
    if wanted(trainer.compile, device):
        compile_networks(method)
    return method


def compile_networks(method: Method) -> None:
    """Compile every network that the method calls, its teachers' included, when it is first called.

    Names in the state dict stay what they are. A network that does not compile runs as it is, which is said once.
    """
    told: list[str] = []
    for name, network in method.named_children():
        if name not in method.uncompiled:
            within = getattr(network, "module", None)  # a teacher's network is below it
            inner = within if isinstance(within, nn.Module) else network
            inner._compiled_call_impl = _OrPlain(inner, name, told)  # the slot that nn.Module.compile fills


class _OrPlain:
    """A network's compiled call; its plain one from the first failure to compile on."""

    def __init__(self, network: nn.Module, name: str, told: list[str]) -> None:
        self.plain: Callable[..., Any] = network._call_impl
        self.name, self.told = name, told
        self.compiled: Callable[..., Any] | None = torch.compile(network._call_impl)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a missing compiler shows as many kinds of error; a real one comes again below
                self.compiled = None
                if not self.told:
                    reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    log.warning(f"The {self.name} could not be compiled and runs uncompiled: {reason[0][:200]}")
                self.told.append(self.name)
        return self.plain(*args, **kwargs)
