"""Runs a function on several gloo processes of this machine and hands back what each returned.

The processes stay for the next call: to import torch takes longer than most of what they are asked.
"""

from __future__ import annotations

import atexit
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_running: list[tuple[mp.Process, Connection]] = []


def run_on(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``[function(rank, *args) for each rank]``, all at once in one gloo group with float64 as the default dtype.

    ``function`` is a module-level function (it is pickled); it returns tensors, numbers, or lists and dicts of them.

    Raises:
        RuntimeError: one of them failed; the others are stopped.
    """
    _begin(processes)
    with tempfile.TemporaryDirectory() as folder:
        ends = [end for _, end in _running[:processes]]
        for rank, end in enumerate(ends):
            end.send_bytes(pickle.dumps((rank, processes, folder, function, args)))
        waiting = list(ends)
        while waiting:
            for end in wait(waiting):
                failed = _answer(end)
                if failed is not None:
                    _stop()  # the others may wait for it for ever
                    raise RuntimeError(f"process {ends.index(end)} of {processes} failed:\n{failed}")
                waiting.remove(end)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _begin(processes: int) -> None:
    """See to it that so many run."""
    context = mp.get_context("spawn")
    while len(_running) < processes:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _running.append((process, ours))


@atexit.register
def _stop() -> None:
    while _running:
        process, end = _running.pop()
        process.kill()
        process.join()
        end.close()


def _answer(end: Connection) -> str | None:
    """None of a process that has done what it was asked, else what went wrong."""
    try:
        answer: str | None = end.recv()
    except EOFError:
        return "it ended"
    return answer


def _serve(end: Connection) -> None:
    """One task after the other."""
    while True:
        try:
            _work(*pickle.loads(end.recv_bytes()))
        except EOFError:
            return
        except BaseException:
            end.send(traceback.format_exc())
        else:
            end.send(None)


def _work(rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
