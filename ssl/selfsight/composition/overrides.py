"""From the words of a command to a configuration: each word is known, or refused in a sentence with the right one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from selfsight.composition.catalogue import choices, conf_dir, job_groups, recipe_job
from selfsight.composition.keys import Word, known
from selfsight.errors import USAGE, UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: keys of paths and names: their values are taken as they are typed, whatever the characters mean to Hydra
LITERAL = (
    "name", "runs", "resume", "start", "run", "teacher", "backbone", "out", "source", "pretrain", "labels.list",
    "labels.split", "dataset.root", "dataset.test", "dataset.unlabelled", "dataset.labels", "dataset.annotations",
    "evaluator.data.root",
)  # fmt: skip


def compose(job: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a job; a mistake in it is a `UserError` of one line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=job):
            return hydra_compose(job, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(" ".join(str(cause).split()), status=USAGE) from None


def checked(job: str, overrides: Sequence[str], *, sweep: bool) -> list[str]:
    """The overrides, each word of them known; otherwise one sentence with the nearest right one.

    ``backbone=<timm name>`` becomes the choice ``timm`` with that name; ``group=null`` leaves an optional group empty.
    """
    groups = job_groups(job)
    chosen: list[str] = []
    values: list[Word] = []
    words = [read(word, groups, sweep=sweep) for word in overrides]
    refuse_beside_resume(overrides, words)
    last = {word.key: word for word in words}
    for word in (word for word in words if word.key not in groups or word is last[word.key]):
        if word.key in groups:
            chosen.extend(group_choice(word.key, word.text, word.override, job))
        elif word.override.is_hydra_override() or word.text.startswith(("+", "~")):
            chosen.append(word.text)
        elif word.override.value() == {}:  # to Hydra: add nothing to what is there
            chosen.extend([f"~{word.key}", f"+{word.text}"])
        else:
            values.append(word)
    first = [text.split(",")[0] if text.split("=")[0] in groups else text for text in chosen]
    own = own_values(job, first, {word.key for word in values})
    if own and any(text.startswith("optimizer=") and "," in text for text in chosen):
        raise UserError(
            "optimizer= names several here, and method or data set come with values for one; try them one by one.",
            status=USAGE,
        )
    targets = [word.text for word in values if word.key.endswith("._target_")]  # they say which keys there are
    cfg = compose(job, first + targets) if values else None
    return [*chosen, *own, *(known(job, cfg, word) for word in values)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read(word: str, groups: Collection[str], *, sweep: bool) -> Word:
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
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        if not equals:
            raise UserError(f"'{word}' is not of the form key=value.", status=USAGE) from None
        mended = shlex.quote(f'{key}=["…","…"]' if value.startswith("[") else f"{key}={quoted(value)}")
        raise UserError(f"the value of '{word}' cannot be read; put text in quotes: {mended}.", status=USAGE) from None
    if override.is_sweep_override() and not sweep:
        raise UserError(f"'{word}' names several values; -m runs every combination.", status=USAGE)
    return Word(word, override)


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


def refuse_beside_resume(typed: Sequence[str], words: Sequence[Word]) -> None:
    """
    Raises:
        UserError: a run is to go on with its own configuration, and with other values.
    """
    if not any(word.key == "resume" and word.override.value() is not None for word in words):
        return
    for text, word in zip(typed, words, strict=True):
        if word.key != "resume" and not word.override.is_hydra_override():
            raise UserError(
                f"resume= goes on with the run's own configuration and takes nothing beside it: leave out {text}, or "
                "begin a new run.",
                status=USAGE,
            )


# --- groups ----------------------------------------------------------------------------------------------------------


def group_choice(group: str, word: str, override: Any, job: str = "pretrain") -> list[str]:
    """The words that choose what ``group=…`` names.

    Raises:
        UserError: there is no such choice, it is made for another job, or one is needed and null was given.
    """
    known = choices(group, job)
    names = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else [override.value()]
    if override.is_delete() or names == [None] or names == ["null"]:
        return left_out(job, group)
    unknown = [str(name) for name in names if str(name) not in known]
    if not unknown:
        return [word]
    if group == "backbone":
        return timm_choice([str(name) for name in names], unknown, known)
    if group == "recipe" and unknown[0] in choices(group):
        raise UserError(f"recipe={unknown[0]} is one for `selfsight {recipe_job(unknown[0])}`.", status=USAGE)
    raise UserError(
        f"there is no {group} '{unknown[0]}'{' for ' + job if unknown[0] in choices(group) else ''}; "
        f"choose from {', '.join(known)}.{nearest(unknown[0], known)}",
        status=USAGE,
    )


def left_out(job: str, group: str) -> list[str]:
    """The words that leave a group without a choice, if the job can do without."""
    if job_groups(job)[group] == "null":
        return []
    if group == "logger":
        return ["~logger"]
    raise UserError(
        f"`selfsight {job}` cannot do without a choice of {group}; choose from {', '.join(choices(group, job))}.",
        status=USAGE,
    )


def timm_choice(names: Sequence[str], unknown: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words for a backbone that is no choice of ours."""
    from selfsight.backbones.registry import is_known

    if all(is_known(name) for name in unknown):
        if len(names) > 1:
            raise UserError(
                f"backbone={unknown[0]} is a timm name and cannot be swept beside others; "
                f"use backbone=timm backbone.name={','.join(names)}.",
                status=USAGE,
            )
        return ["backbone=timm", f"backbone.name={unknown[0]}"]
    import timm

    raise UserError(
        f"there is no backbone '{unknown[0]}', neither here nor in timm."
        f"{nearest(unknown[0], [*known, *timm.list_models()])}",
        status=USAGE,
    )


def own_values(job: str, words: list[str], given: Collection[str]) -> list[str]:
    """Words that give an optimiser chosen by name the values of its own file.

    Without them it would be left with those that method, tuned values or recipe name for another optimiser.

    Args:
        words: the groups chosen. given: keys that the user sets.
    """
    from omegaconf import OmegaConf

    name = next((word.split("=")[1] for word in words if word.startswith("optimizer=")), None)
    if name is None:
        return []
    own: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optimizer" / f"{name}.yaml"))
    found: Any = OmegaConf.to_container(compose(job, words).optimizer)
    wanted = {**dict.fromkeys(found), **own}
    changed = {f"optimizer.{key}": value for key, value in wanted.items() if found.get(key) != value}
    return [f"{key}={json.dumps(value)}" for key, value in changed.items() if key not in given]
