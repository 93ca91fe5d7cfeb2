"""What evaluations leave behind: a record each in ``eval/`` of a run, under a name that says what was asked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.errors import UserError
from selfsight.files import with_folder, write_text
from selfsight.runs.folder import RunFolder

#: what an evaluation leaves behind: protocol, command, data, settings, result
Record = dict[str, Any]

FOLDER = "eval"
LONGEST = 100  # letters of a name

#: keys whose values are told elsewhere, or change no number
UNTOLD = ("_target_", "root", "name", "download", "resident", "stage", "stages")


def read(folder: RunFolder) -> dict[str, Record]:
    """The records of a run, by name."""
    return {path.stem: content(path) for path in sorted((folder.path / FOLDER).glob("*.json"))}


def content(path: Path) -> Record:
    """What a record holds.

    Raises:
        UserError: it is none.
    """
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        found["result"], found["protocol"], found["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read as the record of an evaluation ({error!r}); take it away.") from None
    return found


def free_path(place: Path, name: str, settings: Mapping[str, object]) -> Path:
    """Where the record of an evaluation goes: where that with the same settings is, else where none is yet.

    ``NAME.json``, or ``NAME-2.json`` and so on where one with other settings has that name.
    """
    for number in itertools.count(1):
        path = place / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        if not path.is_file() or content(path).get("settings", settings) == settings:
            return path
    raise AssertionError("there are more numbers than files")


def write(path: Path, record: Mapping[str, object]) -> None:
    """Write a record, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_text(with_folder(path), json.dumps(record, indent=2) + "\n")


def to_json(node: DictConfig | None) -> dict[str, object]:
    """The settings in a part of a configuration, as JSON takes them; the place of images as an absolute path."""
    if node is None:
        return {}
    settings: Any = OmegaConf.to_container(node, resolve=True)
    if settings.get("root") is not None and "://" not in str(settings["root"]):
        settings["root"] = str(Path(settings["root"]).expanduser().resolve())
    found: dict[str, object] = json.loads(json.dumps(settings, default=str))
    return found


def changed_slug(changed: Mapping[str, object]) -> list[str]:
    """Words for values that are not as usual: ``k_5,20``."""
    shown = {key.rpartition(".")[2]: value for key, value in changed.items()}
    return [
        re.sub(r"[^\w.,+-]+", "_", f"{key}_{','.join(map(str, value)) if isinstance(value, list) else value}")
        for key, value in shown.items()
        if key not in UNTOLD
    ]


def joined(words: list[str]) -> str:
    """A name of some words, not longer than file names may be."""
    return "-".join(words)[:LONGEST]


def flat(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested containers by its dotted key."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def figures(result: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The figures of a result by name; those inside another one carry both names. A mean with its spread is one."""
    found: dict[str, object] = {}
    for name, value in result.items():
        title = f"{prefix} {name}".strip()
        found |= figures(value, title) if isinstance(value, Mapping) and "mean" not in value else {title: value}
    return found


def number(value: object) -> str:
    """As a person reads it; with the interval of a mean where it has one, else with the spread."""
    if isinstance(value, Mapping):
        return f"{value['mean']:.4f} ± {value.get('interval', value['std']):.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def data_name(dataset: DictConfig) -> str:
    """What a data set is called in a configuration: by its ``name``, or by the function of a person's own."""
    return str(dataset.get("name") or str(dataset.get("_target_", "")).rpartition(".")[2])


def note_in_metrics(folder: RunFolder, name: str, result: Mapping[str, object]) -> None:
    """Single numbers of an evaluation, as columns of the last epoch in metrics.csv."""
    rows = folder.read_metrics()
    numbers = {f"{name}/{key}": f"{value:.6g}" for key, value in result.items() if isinstance(value, float)}
    if rows and numbers:
        folder.append_metrics({**rows[-1], **numbers})
