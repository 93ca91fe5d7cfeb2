"""NT-Xent as one process of several computes it. A module of its own, so that a new process imports little."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selfsight.losses.ntxent import cross_view_logits, ntxent


def loss_on(rank: int, z: Tensor, how: dict[str, Any]) -> dict[str, Tensor]:
    """Of ``z [R, 2b, D]``, rows of both views for every process: this one's loss, gradient and logits."""
    mine = z[rank].clone().requires_grad_()
    got = ntxent(*mine.chunk(2), **how)
    got.backward()
    assert mine.grad is not None
    options = {name: how[name] for name in ("temperature", "normalize")}
    return {"loss": got.detach(), "grad": mine.grad, "logits": cross_view_logits(*mine.chunk(2), **options)[0]}
