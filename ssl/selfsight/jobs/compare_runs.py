"""`selfsight compare-runs`: several runs in one table and one set of curves, and what differs in how they ran."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from selfsight.errors import UserError
from selfsight.jobs import report
from selfsight.jobs.console import clock_text, make_console, make_table, quiet
from selfsight.jobs.page import figure_html, html_table, page
from selfsight.jobs.run_folder import RunFolder, write_atomically

FIGURES = {"knn_top1": "kNN", "linear_top1": "linear probe", "rank": "rank"}
#: what may differ between repetitions of one run
OF_A_REPETITION = ("seed", "datamodule.seed", "name", "runs", "resume")


def run(cfg: DictConfig) -> None:
    quiet()
    console = make_console()
    if len(cfg.runs) < 2:
        raise UserError("compare-runs takes two run folders or more: selfsight compare-runs runs/A runs/B.", status=2)
    folders = [RunFolder.open(path) for path in cfg.runs]
    titles, rows = table(folders)
    shown = make_table(*titles)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    changed = differences(folders)
    tell_differences(console, folders, changed)
    parts = [
        f"<h1>{' · '.join(html.escape(folder.name) for folder in folders)}</h1>",
        html_table("Figures", titles, rows),
        curves(folders),
        html_table("What differs in the configuration", ["", *(f.name for f in folders)], changed),
    ]
    if cfg.features:
        pairs = alike(folders, cfg.accelerator)
        head = ["runs", "CKA", "shared among 10 neighbours"]
        parts.insert(2, html_table("How alike the embeddings are", head, pairs))
        for pair in pairs:
            console.print(f"{pair[0]}: CKA {pair[1]}, {pair[2]} of 10 neighbours shared")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page("comparison of runs", parts))
    console.print(f"curves: {out}")


def table(folders: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: one a run, and the mean with its spread of runs that differ by their seed alone."""
    found = [folder.read_summary().get("pretrained", {}) for folder in folders]
    shots = sorted({k for one in found for k in one.get("few_shot", {})}, key=int)
    titles = ["run", "epochs", *FIGURES.values(), *(f"{k}/class" for k in shots), "time"]
    rows = []
    for folder, one in zip(folders, found, strict=True):
        few = [one.get("few_shot", {}).get(k) for k in shots]
        seconds = folder.read_summary().get("train_seconds")
        rows.append(
            [
                folder.name,
                str(len(folder.read_metrics())),
                *(figure(key, [one[key]]) if key in one else "" for key in FIGURES),
                *("" if shot is None else f"{shot['mean']:.1%} ± {100 * shot['std']:.1f}" for shot in few),
                "unfinished" if seconds is None else clock_text(seconds),
            ]
        )
    for same in repetitions(folders):
        values = [found[i] for i in same if found[i]]
        if len(values) > 1:
            means = [figure(key, [one[key] for one in values]) if key in values[0] else "" for key in FIGURES]
            rows.append([f"mean of {len(values)} seeds", "", *means, *("" for _ in shots), ""])
    return titles, rows


def figure(key: str, values: Sequence[float]) -> str:
    """One value, or the mean of several with their standard deviation."""
    mean = statistics.fmean(values)
    text = f"{mean:.1f}" if key == "rank" else f"{mean:.1%}"
    if len(values) == 1:
        return text
    spread = statistics.stdev(values)
    return f"{text} ± {spread if key == 'rank' else 100 * spread:.1f}"


def repetitions(folders: Sequence[RunFolder]) -> list[list[int]]:
    """Groups of runs whose configurations differ by the seed alone, each of two or more."""
    groups: dict[str, list[int]] = {}
    for i, folder in enumerate(folders):
        key = repr({k: v for k, v in flattened(folder).items() if k not in OF_A_REPETITION})
        groups.setdefault(key, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def flattened(folder: RunFolder) -> dict[str, str]:
    """Every value of a run's configuration by its dotted key."""
    flat: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = str(node)

    walk(OmegaConf.to_container(folder.config(), resolve=False), "")
    return flat


def differences(folders: Sequence[RunFolder]) -> list[list[str]]:
    """Keys whose values differ, each with the value in every run; a dash where a run has no such key."""
    all_flat = [flattened(folder) for folder in folders]
    keys = list(dict.fromkeys(key for flat in all_flat for key in flat))
    rows = [[key, *(flat.get(key, "–") for flat in all_flat)] for key in keys if key not in ("name", "runs", "resume")]
    return [row for row in rows if len(set(row[1:])) > 1]


def tell_differences(console: Console, folders: Sequence[RunFolder], changed: Sequence[Sequence[str]]) -> None:
    if not changed:
        console.print("The configurations are the same.")
        return
    shown = make_table("configuration", *(folder.name for folder in folders))
    for row in changed:
        shown.add_row(*(escape(cell) for cell in row))
    console.print(shown)


def curves(folders: Sequence[RunFolder]) -> str:
    """A chart for each column that two runs or more have, a line a run."""
    metrics = {folder.name: folder.read_metrics() for folder in folders}
    columns = list(dict.fromkeys(c for rows in metrics.values() for c in report.curve_columns(rows)))
    charts = []
    for column in columns:
        series = {name: report.points(rows, column) for name, rows in metrics.items()}
        if sum(bool(values) for values in series.values()) > 1:
            made = report.curve(series, column)
            made.update_layout(legend={"orientation": "h", "y": -0.35})
            charts.append(f"<div>{figure_html(made, 320)}</div>")
    note = "<p class='soft'>Losses of different methods are different quantities.</p>"
    return f"<h2>Training</h2>{note}<div class='grid'>{''.join(charts)}</div>"


def alike(folders: Sequence[RunFolder], accelerator: str) -> list[list[str]]:
    """CKA and share of common neighbours of the test features, for every pair of runs.

    Raises:
        UserError: the runs learned from different data sets.
    """
    import selfsight
    from selfsight.jobs import build, measure

    configs = [folder.config() for folder in folders]
    if any(cfg.dataset != configs[0].dataset for cfg in configs):
        raise UserError("features=true compares how runs see the same images, and these learned from different ones.")
    features = []
    for folder, cfg in zip(folders, configs, strict=True):
        backbone = selfsight.load(folder.path).to(build.device(accelerator))
        features.append(measure.features(backbone, build.datamodule(cfg))[1])
    compare = build.library("evaluation.comparison").compare
    rows = []
    for (a, x), (b, y) in combinations(zip(folders, features, strict=True), 2):
        found = compare(x, y)
        rows.append([f"{a.name} and {b.name}", f"{found['cka']:.3f}", f"{found['neighbour_overlap']:.1%}"])
    return rows
