"""A first-in-first-out memory of fixed length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError


class Queue(nn.Module):
    """Ring buffer of ``length`` rows of ``dim`` numbers. New rows overwrite the oldest; nothing asks the device.

    Rows are kept as given: gather over ranks and normalise before `push`.

    Attributes:
        data: ``[length, dim]``; rows no batch has reached yet hold what they were made with.
        pointer: row the next one is written to. filled: rows written so far, at most ``length``.
    """

    data: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, length: int, dim: int, *, unit: bool = False) -> None:
        """``unit`` starts with random rows of length 1 in place of zeros."""
        super().__init__()
        if length < 1:
            raise UserError(f"A queue of length {length} was asked for; give at least 1, or leave the queue out.")
        self.register_buffer("data", F.normalize(torch.randn(length, dim)) if unit else torch.zeros(length, dim))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._filled = 0  # the same number on the host, for decisions that must not wait for the device
        self.register_load_state_dict_post_hook(_read_filled)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def full(self) -> bool:
        return self._filled == len(self)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Append ``rows [n, dim]``; of more than ``length`` the last ones stay."""
        skipped, n = max(0, len(rows) - len(self)), len(rows)
        slots = (self.pointer + torch.arange(skipped, n, device=self.data.device)) % len(self)
        self.data[slots] = rows[skipped:].to(self.data.dtype)
        self.pointer.add_(n).remainder_(len(self))
        self.filled.add_(n).clamp_(max=len(self))
        self._filled = min(self._filled + n, len(self))

    def rows(self) -> Tensor:
        """``[filled, dim]`` rows written so far, in storage order; a later `push` overwrites them in place."""
        return self.data[: self._filled]

    def oldest_first(self) -> Tensor:
        """``[filled, dim]`` copy of the rows written so far, in the order they came."""
        if not self.full:
            return self.rows().clone()
        return self.data[(self.pointer + torch.arange(len(self), device=self.data.device)) % len(self)]


def _read_filled(queue: nn.Module, _: Any) -> None:
    assert isinstance(queue, Queue)
    queue._filled = int(queue.filled)


def queue_length(length: int, batch_per_process: int, world_size: int) -> tuple[int, int]:
    """Rows over all processes and rows of one, cut to whole batches (SwAV, main_swav.py); both may come out as 0."""
    length -= length % (batch_per_process * world_size)
    return length, length // world_size
