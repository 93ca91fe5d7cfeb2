"""Runs a function on several gloo processes of this machine and hands back what each returned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``[function(rank, *args) for each rank]``, all at once in one gloo group with float64 as the default dtype.

    ``function`` is a module-level function (it is pickled); it returns tensors, numbers, or lists and dicts of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (processes, folder, function, args), nprocs=processes)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _worker(rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
