"""From the words of a command to a configuration: each word is known, or refused in a sentence with the right one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfsight.composition.catalogue import (
    ADVISED,
    SEVERAL,
    WHOLE_EVALUATION,
    WITHOUT,
    choices,
    evaluates_while_training,
    file,
    files,
    is_own_group,
    job_groups,
    job_of,
    search_path,
)
from selfsight.composition.chosen import group_choice
from selfsight.composition.keys import OPEN, Override, resolve_key
from selfsight.composition.words import parse_override, renamed
from selfsight.errors import USAGE, UserError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

#: ``resume=auto``: the run that ``name`` names, where there is one
AUTO = "auto"
BESIDE_RESUME = ("resume", "extend", "trust")

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
    overrides, composed = checked_and_composed(job, words)
    return finish(job, composed, overrides)


def compose_with(job: str, words: Sequence[str], settings: Mapping[str, object]) -> DictConfig:
    """`compose`, and keys that get these values after all words; further ones may be set in it."""
    return with_settings(compose(job, words), settings)


def with_settings(cfg: DictConfig, settings: Mapping[str, object]) -> DictConfig:
    """A configuration, opened, in which keys have these values."""
    from omegaconf import OmegaConf

    OmegaConf.set_struct(cfg, False)
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def load(job: str, overrides: Sequence[str]) -> Composed:
    """What Hydra composes from overrides that are known to be right.

    Raises:
        UserError: Hydra's own complaint, in one line.
    """
    return divided(job, merged(job, overrides))


def merged(job: str, overrides: Sequence[str]) -> DictConfig:
    """All that Hydra composes, its own part among it.

    Raises:
        UserError: Hydra's own complaint, in one line.
    """
    from hydra.types import RunMode

    with complaints_in_a_line():
        cfg: DictConfig = engine(job).compose_config(job, list(overrides), RunMode.RUN, from_shell=False)
    return cfg


def divided(job: str, cfg: DictConfig) -> Composed:
    """What Hydra composes, its own part and the job's apart."""
    from omegaconf import OmegaConf, open_dict

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


@contextlib.contextmanager
def complaints_in_a_line() -> Iterator[None]:
    """
    Raises:
        UserError: Hydra or OmegaConf complains.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
        raise as_user_error(error) from None


def engine(job: str) -> Hydra:
    """Hydra itself, on the whole search path."""
    from selfsight.compat import hydra_engine

    return hydra_engine(job_of(job), [(provider, str(folder)) for provider, folder in search_path()])


def as_user_error(error: BaseException) -> UserError:
    """What Hydra or OmegaConf complains of, in one line."""
    from omegaconf.errors import OmegaConfBaseException

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if unknown := re.search(r"is not in struct\s+full_key: (\S+)", str(cause)):
        return UserError(f"there is no key '{unknown[1]}'.", status=USAGE)
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
        for name in [name for name in node or () if name not in stays and not str(name).startswith("_")]:
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
    return _checked(job, words, sweep=sweep)[0]


def checked_and_composed(job: str, words: Sequence[str]) -> tuple[list[str], Composed]:
    """`checked`, and what Hydra composes from it: `load`, and in most cases no further composing."""
    from selfsight.compat import set_values

    overrides, values, cfg = _checked(job, words)
    if cfg is None:
        return overrides, load(job, overrides)
    with complaints_in_a_line():
        set_values(cfg, values)
    return overrides, divided(job, cfg)


def _checked(job: str, words: Sequence[str], *, sweep: bool = False) -> tuple[list[str], list[str], DictConfig | None]:
    """The words; those of them that set values, and what Hydra composes from the others, where it had to."""
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
        return [*chosen, *own], own, None
    targets = [override for override in values if override.key.endswith("._target_")]  # they say which keys there are
    parts = [override.key.removesuffix("._target_") for override in targets]
    for override in targets:
        if (root := override.key.partition(".")[0]) not in groups and root not in (whole := load(job, first).cfg):
            resolve_key(job, whole, override)  # refuses it: the job has no such part
    named = [f"++{part}={{}}" for part in parts if part.rpartition(".")[0] in OPEN]
    whole = merged(job, [*first, *named, *(f"++{override.bare}" for override in targets)])
    cfg = divided(job, whole.copy()).cfg
    above = [one for one in values if any(target.key.startswith(f"{one.key}.") for target in targets)]
    first_words = [*above, *targets]  # what is emptied may be filled again
    in_order = [*first_words, *(override for override in values if override not in first_words)]
    known = [text for override in in_order for text in resolve_key(job, cfg, override, parts)]
    return [*chosen, *own, *known], [*own, *known], None if targets else whole


def _by_group(groups: Collection[str], overrides: Sequence[Override]) -> dict[str, Override]:
    """The word that stands for each group: the last one; of a group with several choices at once all of them."""
    found: dict[str, Override] = {}
    for override in overrides:
        group = override.key
        if group not in groups or override.parsed.package is not None:
            continue
        before = found.get(group)
        several = group in SEVERAL and before is not None and before.names and override.names
        found[group] = _joined(group, before, override) if several and before is not None else override
    return found


def _joined(group: str, first: Override, second: Override) -> Override:
    names = dict.fromkeys([*first.names, *second.names])
    return parse_override(f"{group}=[{','.join(names)}]", (), sweep=False)


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
