"""How the words of a command are read: paths and names as they are typed, the rest as Hydra does."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from selfsight.composition import catalogue
from selfsight.composition.catalogue import content
from selfsight.composition.keys import Override
from selfsight.errors import USAGE, UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override as Parsed

#: keys of paths and names: their values are taken as they are typed, whatever the characters mean to Hydra
LITERAL = (
    "name", "runs", "resume", "init_from", "start", "run", "teacher", "weights", "out", "source", "pretrain",
    "where", "labels.list", "labels.split", "dataset.root", "dataset.test", "dataset.unlabelled", "dataset.labels",
    "dataset.only", "dataset.annotations",
    "evaluator.data.root",
)  # fmt: skip

#: words of older commands, and what they are called now
RENAMED = {"tuned": "presets", "backbone": "weights", "start": "init_from"}


def renamed(job: str, word: str, groups: Collection[str]) -> str:
    """A word with the key it has now, where it is typed by an older name that means nothing else in this job."""
    sign, key, equals, value = re.fullmatch(r"(\+{0,2}|~?)([^=]*)(=?)(.*)", word, flags=re.S).groups()  # type: ignore[union-attr]
    new = RENAMED.get(key)
    if new is None or key in groups:
        return word
    keys = {*groups, *(name for path in catalogue.chain(job) for name in content(path))}
    return f"{sign}{new}{equals}{value}" if new in keys and key not in keys else word


def parse_override(word: str, groups: Collection[str], *, sweep: bool) -> Override:
    """A word as Hydra reads it, paths and names as they are typed.

    Raises:
        UserError: it has no value or one that cannot be read, or names several values without ``-m``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    if key.lstrip("+") in LITERAL and key not in groups:
        word = key + equals + literal(key, value, sweep=sweep)
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        if not equals:
            images = f"; images of your own are dataset=folder dataset.root={word}" if os.path.isdir(word) else ""
            raise UserError(f"'{word}' is not of the form key=value{images}.", status=USAGE) from None
        mended = shlex.quote(f'{key}=["…","…"]' if value.startswith("[") else f"{key}={quoted(value)}")
        raise UserError(f"the value of '{word}' cannot be read; put text in quotes: {mended}.", status=USAGE) from None
    if parsed.is_sweep_override() and not sweep:
        raise UserError(f"'{word}' names several values; -m runs every combination.", status=USAGE)
    return Override(word, parsed)


def literal(key: str, value: str, *, sweep: bool) -> str:
    """A path or name, in the quotes that keep Hydra from reading more in it; of a sweep each one."""
    if value == "null" or not value or value[0] in "'\"[" or "${" in value:
        return value
    if key.endswith(".test") and value.isdecimal():  # a number of images, for some data sets
        return value
    if not sweep:
        return quoted(value)
    if re.match(r"\w+\(", value):  # choice(…), range(…)
        return value
    return ",".join(part if part == "null" else quoted(part) for part in value.split(","))


def quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.double).with_quotes()


# --- what is meant for Hydra itself ----------------------------------------------------------------------------------


def hydra_words(job: str, words: Sequence[str], *, many: bool, run: bool) -> tuple[bool, list[str], list[str]]:
    """What words on Hydra itself come to here, where a run has its folder by ``runs`` and ``name``.

    Args:
        many: every combination is asked for. run: the job is to run, not only to be shown.

    Returns:
        Whether it is a sweep, further folders of the search path, and the words that are left or stand for others.

    Raises:
        UserError: one that would be without effect.
    """
    parsed = {word: _hydra_override(word) for word in words}
    mode = next((p.value() for p in parsed.values() if p is not None and p.key_or_group == "hydra.mode"), None)
    many = many or mode == "MULTIRUN"
    keys = {name for path in catalogue.chain(job) for name in content(path)}
    typed = {word.partition("=")[0] for word in words}
    places: list[str] = []
    left: list[str] = []
    for word, override in parsed.items():
        if override is None:
            left.append(word)
            continue
        key, value = override.key_or_group, word.partition("=")[2].strip("'\"")
        if key == "hydra.searchpath":
            found = override.value()
            places.extend(map(str, found if isinstance(found, list) else [found]))
        elif key == "hydra.mode" or not run:
            left.extend([] if key == "hydra.mode" else [word])
        elif key == "hydra.run.dir" and not many and {"runs", "name"} <= keys:
            parent, _, name = value.rstrip("/").rpartition("/")
            left.extend([f"runs={parent or '.'}", f"name={name}"])
        elif many and key == "hydra.sweep.dir":
            left.extend([word] if "runs" in typed or "runs" not in keys else [word, f"runs={value}"])
        elif not many or key in ("hydra.run.dir", "hydra.sweep.subdir"):
            raise UserError(f"'{word}' would have no effect: {_in_place_of(key, many)}.", status=USAGE)
        else:
            left.append(word)
    return many, places, left


def _hydra_override(word: str) -> Parsed | None:
    """A word on Hydra itself as Hydra reads it; None for another one."""
    if not word.lstrip("+~").startswith(("hydra.", "hydra/")):
        return None
    return parse_override(word, (), sweep=True).parsed


def _in_place_of(key: str, many: bool) -> str:
    if key in ("hydra.run.dir", "hydra.sweep.subdir"):
        return "a run's folder is runs=DIR and name=NAME" + (
            ", and all of a sweep are in hydra.sweep.dir" if many else ""
        )
    if key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep")):
        return "it is for sweeps; add -m"
    return "Hydra follows it in sweeps (-m); a single run keeps all it writes in its own folder"
