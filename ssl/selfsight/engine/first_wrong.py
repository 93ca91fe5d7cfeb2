"""Which tensor of a step became no number first: operation by operation, through loss and gradient."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import selfsight
from selfsight.compat import watching_operations
from selfsight.contracts import Batch, SemiBatch
from selfsight.methods.base import Method

#: beginnings of the names of operations that put values where they are told: masks of -inf, memory not yet written
PLACING = (
    "_to_copy", "clone", "copy", "detach", "empty", "expand", "fill", "full", "index_put", "masked_fill", "new_",
    "scatter", "select", "set_", "slice", "view", "where",
)  # fmt: skip


def first_wrong(method: Method, batch: Batch | SemiBatch, step: int) -> tuple[float, str]:
    """Loss of a batch, and what of state, views, loss or gradient was no number first; empty where all are.

    Args:
        step: where the clock stands. Gradients stay in the method.
    """
    for kind, tensors in (("the weights", method.state_dict()), ("the views", named_views(batch))):
        for name, tensor in tensors.items():
            if not _finite(tensor):
                return float("nan"), f"{kind} before the step: {name}, {_described(tensor)}"
    method.set_clock(step)
    watch = Watch(method, forward=True)
    with watch:
        loss = method.training_step(batch, 0)["loss"]
    value = loss.detach().item()
    if not _finite(loss):
        return value, watch.found or "the loss, and nothing it is made of"
    back = Watch(method, forward=False)
    with back:
        loss.backward()
    wrong = [name for name, p in method.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not wrong:
        return value, ""
    return value, f"{back.found}, on the way back; the gradient of {', '.join(wrong[:3])}" + (
        f" and {len(wrong) - 3} others" if len(wrong) > 3 else ""
    )


def named_views(batch: Batch | SemiBatch) -> dict[str, Tensor]:
    """Every view of a batch, by a name that a person understands."""
    parts = {"": batch} if isinstance(batch, Batch) else {"labelled ": batch.labelled, "unlabelled ": batch.unlabelled}
    return {f"{name}view {i + 1}": view for name, part in parts.items() for i, view in enumerate(part.views)}


class Watch:
    """A context that notes the first operation that makes something else than numbers of numbers.

    Args:
        forward: layer and line are known on the way through the loss, and not back.

    Attributes:
        found: operation, layer, shape and line of it; empty where there is none.
    """

    def __init__(self, network: nn.Module, *, forward: bool) -> None:
        self.network, self.forward, self.found = network, forward, ""
        self._within: list[str] = []
        self._watch = watching_operations(self.look)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Watch:
        for name, module in self.network.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda _, __, name=name: self._within.append(name)))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave()))
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)  # type: ignore[arg-type]
        for handle in self._handles:
            handle.remove()

    def _leave(self) -> None:
        self._within.pop()

    def look(self, name: str, arguments: Sequence[object], result: object) -> None:
        if self.found or name.startswith(PLACING):
            return
        for made in _tensors(result):
            if not _finite(made) and all(map(_finite, _tensors(arguments))):
                layer = f" in {self._within[-1]}" if self._within and self._within[-1] else ""
                line = _line_of_ours() if self.forward else ""
                self.found = f"{name}{layer}, {_described(made)}{line}"
                return


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _described(tensor: Tensor) -> str:
    """``3 of 64 values of [8, 8] are no numbers``."""
    return f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values of {list(tensor.shape)} are no numbers"


def _line_of_ours() -> str:
    """The innermost line that is neither PyTorch's nor of this file."""
    torch_code, here = str(Path(torch.__file__).parent), str(Path(selfsight.__file__).parent / "compat.py")
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(torch_code) and f.filename != here]
    frames = [frame for frame in frames if frame.filename != __file__]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
