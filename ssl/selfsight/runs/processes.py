"""Which of the processes of a run this one is, told from what launchers leave in the environment."""

from __future__ import annotations

import os
import time

STOPPED = 128  #: and the number of the signal make the exit status of a process that a signal has stopped
INTERRUPTED = 130  #: exit status after Ctrl-C

#: tells the other processes of a run which folder the first one made
RUN_VARIABLE = "SELFSIGHT_RUN_FOLDER"

#: job and configuration, as JSON, of a run inside another command: its processes do that, whatever their words say
TASK_VARIABLE = "SELFSIGHT_TASK"

#: what Lightning, torchrun and their like say to each process of a run, and what a run of its own must not hear
SPREAD_VARIABLES = (
    "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", RUN_VARIABLE, TASK_VARIABLE,
)  # fmt: skip


def on_first_process() -> bool:
    """Whether this is the process that speaks and writes.

    A rank of SLURM's counts among several tasks only: in a shell of one it is left over from another command.
    """
    ranks = ["LOCAL_RANK", "NODE_RANK", "GROUP_RANK"]
    if os.environ.get("SLURM_NTASKS", "1") != "1":
        ranks.append("SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def started_by_torchrun() -> tuple[int, int] | None:
    """Processes on each machine, and machines, where torchrun has started this process; None where it has not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here


#: who has started this process
PARENT = os.getppid()


def first_has_ended(patience: float = 15.0) -> bool:
    """Whether the first process, which has started this one, has ended or does so within ``patience`` seconds.

    What went wrong in all processes it has told by then; what went wrong in this one alone it never learns of.
    """
    deadline = time.monotonic() + patience
    while os.getppid() == PARENT and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != PARENT
