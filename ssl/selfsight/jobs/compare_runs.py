"""`selfsight compare-runs`: several runs in one table and one set of curves, and what differs in how they ran."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig
from rich.markup import escape

from selfsight.errors import UserError
from selfsight.files import with_folder, write_text
from selfsight.reporting.page import html_table, page
from selfsight.reporting.run_comparison import (
    alike,
    check_images,
    curves_of,
    differences,
    main_differences,
    table,
    titles_of,
)
from selfsight.runs.console import make_console, make_table
from selfsight.runs.folder import RunFolder


def run(cfg: DictConfig) -> None:
    console = make_console()
    folders = opened(cfg.runs)
    if cfg.features:
        check_images(folders)
    out = with_folder(Path(cfg.out).expanduser())
    titles, rows = table(folders)
    console.print(make_table(*titles, rows=rows))
    names, changed = titles_of(folders), differences(folders)
    if changed:
        shown = main_differences(changed)
        console.print(make_table("configuration", *map(escape, names), rows=shown))
        if further := len(changed) - len(shown):
            console.print(f"and {further} more values differ, which the page below has", style="dim", highlight=False)
    else:
        console.print("The configurations are the same.")
    parts = [
        f"<h1>{' · '.join(map(html.escape, names))}</h1>",
        html_table("Figures", titles, rows),
        curves_of(folders),
        html_table("What differs in the configuration", ["", *names], changed),
    ]
    if cfg.features:
        pairs = alike(folders, cfg.accelerator)
        head = ["runs", "CKA", "shared among 10 neighbours"]
        parts.insert(2, html_table("How alike the embeddings are", head, pairs))
        for pair in pairs:
            console.print(f"{escape(pair[0])}: CKA {pair[1]}, {pair[2]} of 10 neighbours shared")
    write_text(out, page("comparison of runs", parts))
    console.print(f"curves: {out}")


def opened(paths: Iterable[str]) -> list[RunFolder]:
    """The runs to compare, each once however often it is named.

    Raises:
        UserError: fewer than two.
    """
    folders = {folder.path.resolve(): folder for folder in map(RunFolder.open, paths)}
    if len(folders) < 2:
        raise UserError(
            "compare-runs takes two different run folders or more: selfsight compare-runs runs/A runs/B.", status=2
        )
    return list(folders.values())
