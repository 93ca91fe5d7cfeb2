"""What makes a training step faster and changes nothing of what is learned."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from selfsight.cpu_memory import keep_freed_memory
from selfsight.engine.devices import resolve_auto
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.nn.in_chunks import in_chunks
from selfsight.nn.memory_format import to_channels_last

log = logging.getLogger("selfsight")


def apply_performance_options(method: Method, options: TrainerOptions, device: torch.device) -> Method:
    """Memory format, compiled networks, recomputed activations and cached gradients as asked; returns the method.

    Raises:
        UserError: activation checkpointing for a backbone that cannot do it, CUDA graphs or cached gradients where they
            cannot be.
    """
    if options.cuda_graphs:
        check_graphs(options, device)
    if options.checkpoint_activations:
        turn_on = getattr(method.backbone, "set_grad_checkpointing", None)
        if turn_on is None:
            raise UserError(
                f"the backbone {type(method.backbone).__name__} cannot recompute activations; "
                "leave trainer.checkpoint_activations=false or choose one of timm's."
            )
        turn_on(True)
    if device.type == "cpu":
        keep_freed_memory()
    if resolve_auto(options.channels_last, device):
        to_channels_last(method, device)
    if options.grad_cache is not None:
        check_cache(method, options)
        in_chunks(method.backbone, options.grad_cache)
    elif resolve_auto(options.compile, device):
        compile_networks(method, options.cuda_graphs)
    return method


def check_graphs(options: TrainerOptions, device: torch.device) -> None:
    """
    Raises:
        UserError: CUDA graphs without CUDA, without compiled networks, or with gradients that add up over batches.
    """
    wrong = (
        f"needs a GPU and this run computes on {device.type}" if device.type != "cuda"
        else "replays compiled networks and trainer.compile is false" if not resolve_auto(options.compile, device)
        else "overwrites gradients that trainer.accumulate wants to add up" if options.accumulate > 1
        else None
    )  # fmt: skip
    if wrong:
        raise UserError(f"trainer.cuda_graphs=true {wrong}; leave it false.")


def check_cache(method: Method, options: TrainerOptions) -> None:
    """
    Raises:
        UserError: cached gradients for a method that needs none, or with what they do not go together with.
    """
    asked = f"trainer.grad_cache={options.grad_cache}"
    if not method.across_images:
        raise UserError(
            f"{asked} is for losses that compare the images of a batch, and {type(method).__name__} has none: "
            "trainer.accumulate adds up batches exactly, in one pass."
        )
    for key in ("compile", "cuda_graphs", "checkpoint_activations"):
        if getattr(options, key) is True:
            raise UserError(f"{asked} computes networks again as they are: leave out trainer.{key}=true.")


def compile_networks(method: Method, graphs: bool = False) -> None:
    """Compile every network that the method calls, its teachers' included, when it is first called.

    A backbone has two entries, the call and ``forward_features``. Names in the state dict stay what they are. A network
    that does not compile runs as it is, which is said once. With ``graphs`` training steps replay recorded kernels,
    see `GraphSteps`.
    """
    told: list[str] = []
    for name, network in method.named_children():
        if name not in method.uncompiled:
            inner = _called(network)
            # the slot that nn.Module.compile fills
            inner._compiled_call_impl = CompiledWithFallback(inner._call_impl, name, told, graphs)
            to_map: Any = getattr(inner, "forward_features", None)
            if to_map is not None:
                inner.forward_features = CompiledWithFallback(to_map, name, told, graphs)  # type: ignore[assignment]


def _called(network: nn.Module) -> nn.Module:
    """What is called in the end: a teacher's network is below it."""
    within = getattr(network, "module", None)
    return within if isinstance(within, nn.Module) else network


class GraphSteps(Callback):
    """Tells recorded networks where a training step begins and ends.

    All that they give lives until the next step begins. Outside, in an evaluation of many batches, nothing is replayed.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self._replay(pl_module, True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._replay(pl_module, False)

    @staticmethod
    def _replay(method: nn.Module, on: bool) -> None:
        for network in map(_called, method.children()):
            for entry in (network._compiled_call_impl, getattr(network, "forward_features", None)):
                if isinstance(entry, CompiledWithFallback):
                    entry.replays = on


class CompiledWithFallback:
    """A network's method, compiled; the eager one from the first failure to compile on, and within other compiled code.

    A copy of the network gets the eager method: the compiled one would go on using the weights of the original.

    Attributes:
        replays: the call belongs to a training step, whose kernels are recorded once and replayed from then on.
    """

    def __init__(self, eager: Callable[..., Tensor], name: str, told: list[str], graphs: bool) -> None:
        self.eager = eager
        self.name, self.told = name, told
        self.compiled: Callable[..., Tensor] | None = torch.compile(eager)
        self.recorded = torch.compile(eager, mode="reduce-overhead") if graphs else self.compiled
        self.replays = False

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., Tensor]:
        return copy.deepcopy(self.eager, memo)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        if self.compiled is not None and not torch.compiler.is_compiling():
            try:
                return (self.recorded if self.replays else self.compiled)(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a missing compiler shows as many kinds of error; a real one comes again below
                self.compiled = None
                if not self.told:
                    reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    log.warning(f"The {self.name} could not be compiled and runs uncompiled: {reason[0][:200]}")
                self.told.append(self.name)
        return self.eager(*args, **kwargs)
