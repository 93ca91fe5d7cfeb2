"""From the words of a command to a configuration: each word is known, or refused in a sentence with the right one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfsight.composition import catalogue
from selfsight.composition.catalogue import (
    ADVISED,
    SEVERAL,
    WHOLE_EVALUATION,
    WITHOUT,
    choices,
    content,
    evaluates_while_training,
    file,
    files,
    is_own_group,
    job_groups,
    job_of,
    recipe_job,
    search_path,
)
from selfsight.composition.keys import OPEN, Override, resolve_key
from selfsight.errors import USAGE, UserError, nearest

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override as Parsed
    from omegaconf import DictConfig

#: keys of paths and names: their values are taken as they are typed, whatever the characters mean to Hydra
LITERAL = (
    "name", "runs", "resume", "init_from", "start", "run", "teacher", "weights", "out", "source", "pretrain",
    "where", "labels.list", "labels.split", "dataset.root", "dataset.test", "dataset.unlabelled", "dataset.labels",
    "dataset.only", "dataset.annotations",
    "evaluator.data.root",
)  # fmt: skip

#: ``resume=auto``: the run that ``name`` names, where there is one
AUTO = "auto"
BESIDE_RESUME = ("resume", "extend", "trust")

#: words of older commands, and what they are called now
RENAMED = {"tuned": "presets", "backbone": "weights", "start": "init_from"}

#: packages that bring a choice of Hydra's own groups
BROUGHT_BY = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_local": "'selfsight[slurm]'",
    "hydra/launcher=submitit_slurm": "'selfsight[slurm]'",
}


class Composed(NamedTuple):
    """What Hydra makes of words: the configuration of a job, that of Hydra itself, and which choices were made."""

    cfg: DictConfig
    hydra: DictConfig
    choices: dict[str, object]


def compose(job: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a job, final and complete: ``job`` and ``choices`` stand in it.

    Args:
        job: or the name of a person's own configuration of one.
        words: as on the command line.

    Raises:
        UserError: a wrong word; names the nearest right one.
    """
    overrides = checked(job, words)
    return finish(job, load(job, overrides), overrides)


def load(job: str, overrides: Sequence[str]) -> Composed:
    """What Hydra composes from overrides that are known to be right.

    Raises:
        UserError: Hydra's own complaint, in one line.
    """
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        cfg = engine(job).compose_config(job, list(overrides), RunMode.RUN, from_shell=False)
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
        raise as_user_error(error) from None
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
        for key in WITHOUT.get(job_of(job), ()):
            cfg.pop(key, None)
    if job_of(job) in ADVISED:  # what goes on from a run is told, or has the labels of that one
        labels_of_a_try(cfg)
    made: Any = OmegaConf.to_container(hydra.runtime.choices)
    return Composed(cfg, hydra, made)


def labels_of_a_try(cfg: DictConfig) -> None:
    """A run that ``debug=`` shrinks and that has to know which labels are kept, keeps one of each class unless told."""
    from selfsight.datamodules.datasets.amounts import is_said

    labels = cfg.get("labels")
    if cfg.get("debug") is not None and labels is not None and not is_said(labels):
        labels.per_class = 1


def engine(job: str) -> Hydra:
    """Hydra itself, on the whole search path."""
    from selfsight.compat import hydra_engine

    return hydra_engine(job_of(job), [(provider, str(folder)) for provider, folder in search_path()])


def as_user_error(error: BaseException) -> UserError:
    """What Hydra or OmegaConf complains of, in one line."""
    from omegaconf.errors import OmegaConfBaseException

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return UserError(" ".join(str(cause).split()), status=USAGE)


def finish(job: str, composed: Composed, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a job from what Hydra has composed.

    Args:
        overrides: those that it was composed from.
    """
    from omegaconf import OmegaConf, open_dict

    from selfsight.composition.defaults import complete

    cfg = composed.cfg
    order = dict.fromkeys([*job_groups(job), *composed.choices])
    made = {group: composed.choices[group] for group in order if group in composed.choices and "hydra/" not in group}
    with open_dict(cfg):
        for key in WITHOUT.get(job_of(job), ()):
            cfg.pop(key, None)
        begin_anew(cfg, overrides)
        expand_single_evaluator(job, cfg, str(made.get("evaluator")))
        cfg.job = job_of(job)
        if not files("presets", str(made.get("presets"))):  # they are optional
            made |= {"presets": None} if "presets" in made else {}
        cfg.choices = made | retargeted(cfg, overrides)
        complete(cfg, job)
    OmegaConf.set_struct(cfg, True)
    return cfg


def begin_anew(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """A part whose ``_target_`` is set has nothing of what was chosen in its place: only what is set beside that."""
    from omegaconf import OmegaConf

    keys = [word.lstrip("+~").partition("=")[0] for word in overrides]
    for part in _retargeted(overrides):
        node = OmegaConf.select(cfg, part)
        stays = {key[len(part) + 1 :].partition(".")[0] for key in keys if key.startswith(f"{part}.")}
        for name in [name for name in node if name not in stays and not str(name).startswith("_")]:
            del node[name]


def retargeted(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, object]:
    """The parts that are no choice of a group: made by a ``_target_`` that is set, which stands for one."""
    return {part: cfg[part]._target_ for part in _retargeted(overrides) if part in cfg and part != "optimizer"}


def _retargeted(overrides: Sequence[str]) -> list[str]:
    keys = [word.lstrip("+~").partition("=")[0] for word in overrides]
    return [key.removesuffix("._target_") for key in keys if key.endswith("._target_")]


def expand_single_evaluator(job: str, cfg: DictConfig, name: str) -> None:
    """``evaluator=knn`` for a job that evaluates while training and at the end: this one alone, both times."""
    from omegaconf import OmegaConf

    if not evaluates_while_training(job) or "_target_" not in cfg.evaluator:
        return
    whole: Any = OmegaConf.load(file("evaluator", WHOLE_EVALUATION))
    cfg.evaluator = {"online": {**whole.online, "evaluators": {name: cfg.evaluator}}, "final": {name: cfg.evaluator}}


# --- checking --------------------------------------------------------------------------------------------------------


def checked(job: str, words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words as Hydra takes them, each of them known; otherwise one sentence with the nearest right one.

    ``backbone=<timm name>`` becomes the choice ``timm`` with that name; ``group=null`` leaves an optional group empty.
    What is checked already stays as it is.
    """
    groups = job_groups(job)
    words = as_extension(words)
    overrides = [parse_override(renamed(job, word, groups), groups, sweep=sweep) for word in words]
    refuse_beside_resume(words, overrides)
    for group in (group for group, choice in groups.items() if choice == "???"):
        if all(override.key != group for override in overrides):
            raise UserError(
                f"{group} has to be given: {group}=NAME; choose from {', '.join(choices(group, job))}.", status=USAGE
            )
    chosen: list[str] = []
    values: list[Override] = []
    for group, made in _by_group(groups, overrides).items():
        chosen.extend(group_choice(group, made.text, made.parsed, job))
    for override in overrides:
        if override.key in groups and override.parsed.package is None:
            continue
        added = override.adds and is_own_group(override.key)
        if override.parsed.is_hydra_override() or override.parsed.package is not None or added:
            chosen.append(override.text)
        else:
            values.append(override)
    first = [text.split(",")[0] if text.split("=")[0] in groups and "=[" not in text else text for text in chosen]
    own = own_values(job, first, {override.key for override in values})
    if own and any(text.startswith("optimizer=") and "," in text for text in chosen):
        raise UserError(
            "optimizer= names several here, and method or data set come with values for one; try them one by one.",
            status=USAGE,
        )
    if not values:
        return [*chosen, *own]
    targets = [override for override in values if override.key.endswith("._target_")]  # they say which keys there are
    parts = [override.key.removesuffix("._target_") for override in targets]
    for override in targets:
        if (root := override.key.partition(".")[0]) not in groups and root not in (whole := load(job, first).cfg):
            resolve_key(job, whole, override)  # refuses it: the job has no such part
    named = [f"++{part}={{}}" for part in parts if part.rpartition(".")[0] in OPEN]
    cfg = load(job, [*first, *named, *(f"++{override.bare}" for override in targets)]).cfg
    in_order = [*targets, *(override for override in values if override not in targets)]
    known = [text for override in in_order for text in resolve_key(job, cfg, override, parts)]
    return [*chosen, *own, *known]


def _by_group(groups: Collection[str], overrides: Sequence[Override]) -> dict[str, Override]:
    """The word that stands for each group: the last one; of a group with several choices at once all of them."""
    found: dict[str, Override] = {}
    for override in overrides:
        group = override.key
        if group not in groups or override.parsed.package is not None:
            continue
        before = found.get(group)
        several = group in SEVERAL and before is not None and _names(before) and _names(override)
        found[group] = _joined(group, before, override) if several and before is not None else override
    return found


def _joined(group: str, first: Override, second: Override) -> Override:
    names = dict.fromkeys([*_names(first), *_names(second)])
    return parse_override(f"{group}=[{','.join(names)}]", (), sweep=False)


def _names(override: Override) -> list[str]:
    """The choices that a word of a group names; none where it leaves the group empty or sweeps over several."""
    if override.deletes or override.parsed.is_sweep_override() or override.value is None:
        return []
    return [str(name) for name in (override.value if isinstance(override.value, list) else [override.value])]


def renamed(job: str, word: str, groups: Collection[str]) -> str:
    """A word with the key it has now, where it is typed by an older name that means nothing else in this job."""
    sign, key, equals, value = re.fullmatch(r"(\+{0,2}|~?)([^=]*)(=?)(.*)", word, flags=re.S).groups()  # type: ignore[union-attr]
    new = RENAMED.get(key)
    if new is None or key in groups:
        return word
    keys = {*groups, *(name for path in catalogue.chain(job) for name in content(path))}
    return f"{sign}{new}{equals}{value}" if new in keys and key not in keys else word


# --- reading ---------------------------------------------------------------------------------------------------------


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
            raise UserError(f"'{word}' is not of the form key=value.", status=USAGE) from None
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


def as_extension(words: Sequence[str]) -> list[str]:
    """The words, ``trainer.max_epochs=+50`` beside ``resume=`` as ``extend=50``: 50 more than the run has."""
    if not any(word.startswith("resume=") for word in words):
        return list(words)
    return [re.sub(r"^trainer\.max_epochs=\+(?=\d+$)", "extend=", word) for word in words]


def refuse_beside_resume(typed: Sequence[str], overrides: Sequence[Override]) -> None:
    """
    Raises:
        UserError: a run is to go on with its own configuration, and with other values.
    """
    if not any(override.key == "resume" and override.value not in (None, AUTO) for override in overrides):
        return
    for text, override in zip(typed, overrides, strict=True):
        if override.key not in BESIDE_RESUME and not override.parsed.is_hydra_override():
            raise UserError(
                "resume= goes on with the run's own configuration and takes nothing beside it but extend=EPOCHS: "
                f"leave out {text}, or begin a new run.",
                status=USAGE,
            )


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


# --- groups ----------------------------------------------------------------------------------------------------------


def group_choice(group: str, word: str, parsed: Parsed, job: str = "pretrain") -> list[str]:
    """The words that choose what ``group=…`` names.

    Raises:
        UserError: there is no such choice, it is made for another job, or one is needed and null was given.
    """
    known = choices(group, job)
    override = Override(word, parsed)
    if parsed.is_delete() or override.bare in (f"{group}=null", f"{group}=[]"):
        return left_out(job, group)
    names = chosen_names(group, override, known)
    unknown = [name for name in names if name not in known and name != "null"]
    if unknown and group == "backbone":
        return timm_choice(names, unknown, known)
    if unknown and group == "recipe" and unknown[0] in choices(group):
        raise UserError(f"recipe={unknown[0]} is one for `selfsight {recipe_job(unknown[0])}`.", status=USAGE)
    if unknown:
        raise UserError(
            f"there is no {group} '{unknown[0]}'{' for ' + job if unknown[0] in choices(group) else ''}; "
            f"choose from {', '.join(known)}.{nearest(unknown[0], known)}",
            status=USAGE,
        )
    for name in names:
        if name != "null":
            content(file(group, name))  # which refuses what is no configuration
    return [f"{group}={','.join(names)}" if parsed.is_sweep_override() else override.bare]


def chosen_names(group: str, override: Override, known: Sequence[str]) -> list[str]:
    """The choices that a word names, those of a sweep and of a pattern included.

    Raises:
        UserError: several at once where one is expected, or a pattern that fits none.
    """
    parsed = override.parsed
    if override.is_pattern:
        found = [str(name) for name in override.value.filter(list(known))]
        if not found:
            raise UserError(f"'{override.text}' fits none of {', '.join(known)}.", status=USAGE)
        return found
    if parsed.is_interval_sweep():
        raise UserError(
            f"'{override.text}' gives numbers; the choices of {group} are {', '.join(known)}.", status=USAGE
        )
    if isinstance(override.value, list) and group not in SEVERAL:
        raise UserError(f"'{override.text}' makes several choices of {group} at once; one was expected.", status=USAGE)
    return [str(v) for v in parsed.sweep_string_iterator()] if parsed.is_sweep_override() else _names(override)


def left_out(job: str, group: str) -> list[str]:
    """The words that leave a group without a choice, if the job can do without."""
    if group in ("logger", "presets"):
        return [f"~{group}"]
    if job_groups(job)[group] is None:
        return []
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

    Without them it would be left with those that method, presets or recipe name for another optimiser.

    Args:
        words: the groups chosen. given: keys that the user sets.
    """
    from omegaconf import OmegaConf

    name = next((word.split("=")[1] for word in words if word.startswith("optimizer=")), None)
    if name is None:
        return []
    own: Any = OmegaConf.to_container(OmegaConf.load(file("optimizer", name)))
    found: Any = OmegaConf.to_container(load(job, words).cfg.optimizer)
    if all(found.get(key, ...) == own.get(key, ...) for key in {*found, *own}):
        return []
    return [f"optimizer.{key}={json.dumps(value)}" for key, value in own.items() if f"optimizer.{key}" not in given]
