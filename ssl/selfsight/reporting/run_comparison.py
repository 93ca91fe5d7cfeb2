"""Several runs beside each other: a table of their figures, what differs in how they ran, and their curves."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from omegaconf import OmegaConf

from selfsight.engine import measure
from selfsight.engine.subject import subject_of
from selfsight.errors import UserError
from selfsight.evaluation.probes.comparison import compare
from selfsight.reporting import curves
from selfsight.reporting.page import figure_html
from selfsight.runs import figures, records
from selfsight.runs.console import clock_text
from selfsight.runs.folder import RunFolder

#: what a run is called, where it is kept and gone on with says nothing of how it ran; old folders do not name their job
PLACES = ("name", "runs", "resume", "job")
#: differences that a terminal shows, at most
SHOWN_DIFFERENCES = 20
#: the class of a part of a run, such as its method
PART = r"\w+\._target_"
#: keys that name the run another one started from
SOURCES = ("run", "teacher", "init_from", "start")  # the last in older runs


def titles_of(folders: Sequence[RunFolder]) -> list[str]:
    """What to call each run: its folder, and of the folders above it as many as tell it from the others."""
    places = [folder.path.resolve().parts for folder in folders]

    def title(parts: tuple[str, ...]) -> str:
        depth = next(d for d in range(1, len(parts) + 1) if sum(other[-d:] == parts[-d:] for other in places) == 1)
        return "/".join(parts[-depth:])

    return [title(parts) for parts in places]


def table(folders: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: one a run, and the mean with its spread of runs that differ by their seeds alone."""
    summaries = [folder.read_summary() for folder in folders]
    found = [figures.of_run(summary) for summary in summaries]
    columns = list(dict.fromkeys(column for one in found for column in one))
    first = [*figures.SINGLES, *figures.CLASSIFIERS]
    columns.sort(key=lambda column: (0, first.index(column)) if column in first else (1, int(column)))
    names, rows = titles_of(folders), []
    for name, folder, summary, one in zip(names, folders, summaries, found, strict=True):
        seconds = summary.get("train_seconds")
        spent = "unfinished" if seconds is None else clock_text(seconds)
        rows.append(
            [name, str(len(folder.read_metrics())), *(text(column, one.get(column)) for column in columns), spent]
        )
    for same in repetitions(folders):
        finished = [found[i] for i in same if found[i]]
        if len(finished) > 1:
            means = [text(column, mean_of([one.get(column) for one in finished])) for column in columns]
            rows.append([f"mean of {len(finished)} seeds ({names[same[0]]}, …)", "", *means, ""])
    return ["run", "epochs", *map(figures.heading, columns), "time"], rows


def mean_of(values: Sequence[figures.Value | None]) -> figures.Value | None:
    """Over runs, with the standard deviation between them; None where one of them lacks it."""
    means = [value.mean for value in values if value is not None]
    return figures.Value(statistics.fmean(means), statistics.stdev(means)) if len(means) == len(values) else None


def text(column: str, value: figures.Value | None) -> str:
    """A figure as a person reads it, with its spread where it has one."""
    if value is None:
        return ""
    shown = figures.as_text(column, value.mean)
    if value.spread is None:
        return shown
    if column.endswith("_r2"):
        return f"{shown} ± {value.spread:.3f}"
    return f"{shown} ± {(1 if column == 'rank' else 100) * value.spread:.1f}"


def repetitions(folders: Sequence[RunFolder]) -> list[list[int]]:
    """Groups of runs whose configurations differ by seeds alone, two or more each; of equal ones the first is in it."""
    groups: dict[str, dict[str, int]] = {}
    for i, folder in enumerate(folders):
        whole = repr({key: value for key, value in flattened(folder).items() if key not in PLACES})
        groups.setdefault(recipe_of(folder), {}).setdefault(whole, i)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def recipe_of(folder: RunFolder) -> str:
    """What repetitions of a run have in common: all of the configuration but seeds and places.

    A run it started from stands there with what is common to the repetitions of that one.
    """
    flat = {k: v for k, v in flattened(folder).items() if k not in PLACES and k.rpartition(".")[2] != "seed"}
    for place in {flat[key] for key in SOURCES if key in flat}:
        if (Path(place) / "config.yaml").is_file():
            of_source = recipe_of(RunFolder(Path(place)))
            flat = {key: value.replace(place, of_source) for key, value in flat.items()}
    return repr(flat)


def flattened(folder: RunFolder) -> dict[str, str]:
    """Every value of a run's configuration by its dotted key."""
    return {key: str(value) for key, value in records.flat(OmegaConf.to_container(folder.config(), resolve=False))}


def differences(folders: Sequence[RunFolder]) -> list[list[str]]:
    """Keys whose values differ, each with the value in every run; a dash where a run has no such key.

    Of a choice and of the class that it stands for only the class: presets may have put another one in its place.
    """
    all_flat = [flattened(folder) for folder in folders]
    keys = list(dict.fromkeys(key for flat in all_flat for key in flat))
    rows = [[key, *(flat.get(key, "–") for flat in all_flat)] for key in keys if key not in PLACES]
    differing = {row[0]: row for row in rows if len(set(row[1:])) > 1}
    return [
        row
        for key, row in differing.items()
        if not (key.startswith("choices.") and f"{key.removeprefix('choices.')}._target_" in keys)
    ]


def main_differences(rows: Sequence[list[str]]) -> list[list[str]]:
    """Of many differences those that the others follow from: whole parts, what was chosen by name, single values."""
    if len(rows) <= SHOWN_DIFFERENCES:
        return list(rows)
    main = [row for row in rows if "." not in row[0] or row[0].startswith("choices.") or re.fullmatch(PART, row[0])]
    return main[:SHOWN_DIFFERENCES] or list(rows[:SHOWN_DIFFERENCES])


def curves_of(folders: Sequence[RunFolder]) -> str:
    """A chart for each column that two runs or more have, a line a run."""
    metrics = {title: folder.read_metrics() for title, folder in zip(titles_of(folders), folders, strict=True)}
    columns = list(dict.fromkeys(c for rows in metrics.values() for c in curves.curve_columns(rows)))
    charts = []
    for column in columns:
        series = {name: curves.points(rows, column) for name, rows in metrics.items()}
        if sum(bool(values) for values in series.values()) > 1:
            made = curves.curve(series, column)
            made.update_layout(legend={"orientation": "h", "y": -0.35})
            charts.append(f"<div>{figure_html(made, 320)}</div>")
    note = "<p class='soft'>Losses of different methods are different quantities.</p>"
    return f"<h2>Training</h2>{note}<div class='grid'>{''.join(charts)}</div>"


def check_images(folders: Sequence[RunFolder]) -> None:
    """
    Raises:
        UserError: the runs learned from different images, so that their features have none in common.
    """
    seen = [(cfg.dataset, cfg.get("limit_images")) for cfg in (folder.config() for folder in folders)]
    if any(one != seen[0] for one in seen):
        raise UserError("features=true compares how runs see the same images, and these learned from different ones.")


def alike(folders: Sequence[RunFolder], accelerator: str) -> list[list[str]]:
    """CKA and share of common neighbours of the test features (the training features without a test set), by pairs."""
    features = []
    for folder in folders:
        of = subject_of(folder, accelerator)
        train, test = measure.features(of.backbone, of.data)
        features.append(train if test is None else test)
    rows = []
    for (a, x), (b, y) in combinations(zip(titles_of(folders), features, strict=True), 2):
        found = compare(x, y)
        rows.append([f"{a} and {b}", f"{found['cka']:.3f}", f"{found['neighbour_overlap']:.1%}"])
    return rows
