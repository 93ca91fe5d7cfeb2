"""Keys of a configuration: which there are, which was meant, and whether a value is of the kind that stands there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from selfsight.composition.catalogue import GROUPS, choices, conf_dir, job_groups
from selfsight.errors import USAGE, UserError

#: put before a value's key that has the name of a group: Hydra would look for a choice there (knn backbone=DIR)
ASIDE = "_"

#: what other programs call a thing, and its key here
CALLED_ELSEWHERE = {
    "model": "backbone", "arch": "backbone", "architecture": "backbone", "encoder": "backbone", "network": "backbone",
    "data": "dataset", "data_dir": "dataset.root", "augmentation": "views", "augmentations": "views",
    "transform": "views", "transforms": "views", "scheduler": "schedule", "epochs": "trainer.max_epochs",
    "learning_rate": "optimizer.lr", "wd": "optimizer.weight_decay", "gpus": "trainer.devices",
    "workers": "num_workers",
}  # fmt: skip


class Word(NamedTuple):
    """``key=value`` and what Hydra reads in it."""

    text: str
    override: Any

    @property
    def key(self) -> str:
        return str(self.override.key_or_group)


def known(job: str, cfg: Any, word: Word) -> str:
    """The word as Hydra takes it: a key that is there, or an argument that the thing configured takes all the same.

    Raises:
        UserError: neither; names the nearest key. Or a value of another kind than stands there.
    """
    from omegaconf import OmegaConf

    keys = list(flat_keys(cfg))
    parent, _, leaf = word.key.rpartition(".")
    if word.key in keys:
        text = fitted(OmegaConf.select(cfg, parent) if parent else cfg, word)
        return f"+{ASIDE}{text}" if word.key in GROUPS else text
    arguments = arguments_of(OmegaConf.select(cfg, parent) if parent in keys else None)
    if leaf in arguments:
        return f"+{word.text}"
    keys += [f"{parent}.{name}" for name in arguments]
    raise UserError(f"there is no key '{word.key}'.{right_key(job, word.key, keys)}", status=USAGE)


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from flat_keys(child, f"{prefix}{key}.")


def arguments_of(node: Any) -> list[str]:
    """Names of the arguments that the ``_target_`` of a node takes."""
    import inspect

    from hydra.utils import get_object
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig) or "_target_" not in node:
        return []
    return [name for name in inspect.signature(get_object(node._target_)).parameters if name not in ("self", "kwargs")]


def right_key(job: str, key: str, keys: Sequence[str]) -> str:
    """The sentence that leads from a wrong key to the one that was meant; empty where none is near.

    In this order: another program's name for it, a key of a choice that was not made, the same name elsewhere, a
    similar one beside it, a similar one anywhere.
    """
    groups = job_groups(job)
    if (meant := CALLED_ELSEWHERE.get(key)) in (*keys, *groups):
        return f" Did you mean '{meant}'?"
    if owners := choices_with(job, key):
        return f" It belongs to {key.partition('.')[0]}={', '.join(owners)}."
    parent, _, leaf = key.rpartition(".")
    nodes = {inner.rpartition(".")[0] for inner in keys}
    single = [each for each in keys if each not in nodes]  # a node that holds others is no place for a value
    last = {each: each.rpartition(".")[2] for each in single}
    beside = [each for each in single if parent in nodes and each.rpartition(".")[0] == parent]
    close = (
        [each for each in single if last[each] == leaf]
        or [each for name in near(leaf, [last[each] for each in beside], 0.5) for each in beside if last[each] == name]
        or near(key, [*single, *groups], 0.6)
        or [each for name in near(leaf, [*last.values()], 0.75) for each in single if last[each] == name]
    )
    return f" Did you mean '{close[0]}'?" if close else ""


def near(word: str, among: Sequence[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, among, n=1, cutoff=cutoff)


def choices_with(job: str, key: str) -> list[str]:
    """The choices of a key's group whose file has this key, or names a class that takes it."""
    from omegaconf import OmegaConf

    group, _, rest = key.partition(".")
    if group not in job_groups(job):
        return []
    files = {name: OmegaConf.load(conf_dir() / group / f"{name}.yaml") for name in choices(group, job)}
    return [
        name
        for name, content in files.items()
        if {key, rest} & {*flat_keys(content), *arguments_of(content.get(group))}
    ]


def fitted(holder: Any, word: Word) -> str:
    """The word, if its values are of the kind that stands under its key; for a list, one value becomes a list of one.

    Raises:
        UserError: a word where a number stands, anything but true and false for a switch, one value for several.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import ListConfig

    node, override = holder._get_node(word.key.rpartition(".")[2]), word.override
    if node._is_none() or node._is_interpolation() or node._is_missing():
        return word.text
    texts = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
    parser = OverridesParser.create()
    values = [override.value()] if texts is None else [parser.parse_override(f"x={text}").value() for text in texts]
    known = [value for value in values if not (isinstance(value, str) and "${" in value)]
    for value in known:
        check_kind(word.key, node, value)
    if not isinstance(node, ListConfig) or all(value is None or isinstance(value, (list, dict)) for value in known):
        return word.text
    texts = [override.get_value_element_as_str()] if texts is None else texts
    return f"{word.key}={','.join(text if text.startswith('[') else f'[{text}]' for text in texts)}"


def check_kind(key: str, node: Any, new: Any) -> None:
    """Refuse one value for several, what is no number for a number, and anything but true, false, auto for a switch."""
    from omegaconf import DictConfig, ListConfig

    if isinstance(node, DictConfig) and not isinstance(new, dict):
        inner = [name for name in map(str, node) if not name.startswith("_")]
        several = ", ".join(f"{key}.{name}" for name in inner[:3])
        aside = f", or leave it out: ~{key}" if new is None else ""
        raise UserError(f"{key} holds several values ({several}, …); set one of them{aside}.", status=USAGE)
    old = None if isinstance(node, (DictConfig, ListConfig)) else node._value()
    if isinstance(old, bool) and not isinstance(new, bool) and new != "auto":
        raise UserError(f"{key} is '{new}'; true or false was expected.", status=USAGE)
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if number and new is not None and (isinstance(new, bool) or not isinstance(new, (int, float))):
        raise UserError(f"{key} is '{new}'; a number was expected.", status=USAGE)
