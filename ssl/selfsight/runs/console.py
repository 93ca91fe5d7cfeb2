"""Speaking to a person: one console, and the libraries' own chatter turned down."""

from __future__ import annotations

import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def make_console() -> Console:
    # a notebook asks for colours, FORCE_COLOR, where there is no terminal to move a progress bar on
    console = Console(highlight=False, soft_wrap=True, force_terminal=sys.stdout.isatty())
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def make_table(*titles: str, rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table: words to the left in the first column, numbers to the right in the others.

    Args:
        rows: as they stand; what looks like markup in them is none.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def quiet() -> None:
    """Keep the libraries' notices off the screen; their warnings about our own choices help no user."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: f"warning {message}\n"  # where in the code helps no user
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def clock_text(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def leave_closed_terminal() -> None:
    """What would be written to a terminal that is no more goes nowhere: it would end the run before it has saved."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
