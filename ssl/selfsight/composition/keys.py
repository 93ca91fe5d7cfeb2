"""Keys of a configuration: which there are, which was meant, and whether a value is of the kind that stands there."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from selfsight.composition.catalogue import choices, content, file, is_own_group, job_groups
from selfsight.composition.targets import parameters, takes_any
from selfsight.errors import USAGE, UserError

if TYPE_CHECKING:
    from inspect import Parameter

    from hydra.core.override_parser.types import Override as Parsed
    from omegaconf import DictConfig

#: parts that hold things by names of the person's choosing
OPEN = ("callbacks", "logger", "views", "schedule", "evaluator.final", "evaluator.online.evaluators", "then", "steps")

#: what other programs and other people call a thing, and its key here
CALLED_ELSEWHERE = {
    "model": "backbone", "arch": "backbone", "architecture": "backbone", "encoder": "backbone", "network": "backbone",
    "net": "backbone", "data": "dataset", "data_dir": "dataset.root", "data_path": "dataset.root",
    "augmentation": "views", "augmentations": "views", "transform": "views", "transforms": "views",
    "algorithm": "method", "optim": "optimizer", "optimiser": "optimizer", "opt": "optimizer",
    "scheduler": "schedule", "lr_scheduler": "schedule", "callback": "callbacks", "loggers": "logger",
    "epochs": "trainer.max_epochs", "n_epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps", "iterations": "trainer.max_steps",
    "learning_rate": "optimizer.lr", "lr": "optimizer.lr", "base_lr": "optimizer.lr", "blr": "optimizer.lr",
    "wd": "optimizer.weight_decay", "weight_decay": "optimizer.weight_decay", "momentum": "optimizer.momentum",
    "max_epochs": "trainer.max_epochs", "max_steps": "trainer.max_steps", "gpus": "trainer.devices",
    "devices": "trainer.devices", "ngpus": "trainer.devices", "nodes": "trainer.num_nodes",
    "amp": "trainer.precision", "fp16": "trainer.precision", "bf16": "trainer.precision",
    "workers": "num_workers", "n_workers": "num_workers", "batchsize": "batch_size", "bs": "batch_size",
    "bsz": "batch_size", "random_seed": "seed", "output_dir": "runs", "out_dir": "runs", "run_name": "name",
    "checkpoint": "resume", "ckpt_path": "resume",
    "trainer.val_check_interval": "evaluator.online.every",
    "trainer.check_val_every_n_epoch": "evaluator.online.every",
    "trainer.limit_train_batches": "trainer.limit_batches",
    "trainer.accumulate_grad_batches": "trainer.accumulate",
    "trainer.gradient_clip_val": "trainer.clip_norm",
}  # fmt: skip

#: the same, where the job has no such part as training has
CALLED_IN_OTHER_JOBS = {
    "labels": "labels_per_class", "labels.per_class": "labels_per_class",
    "gpus": "workers", "devices": "workers", "num_workers": "workers", "jobs": "workers", "n_jobs": "workers",
    "seed": "seeds", "methods": "approaches", "method": "approaches", "data": "source", "data_dir": "source",
    "data_path": "source", "root": "source", "input": "source", "folder": "source", "output": "out",
    "output_dir": "out", "out_dir": "out", "size": "shortest", "image_size": "shortest", "resize": "shortest",
    "format": "encode",
}  # fmt: skip

#: the same, of a key inside a part
LEAF_ELSEWHERE = {
    "learning_rate": "lr", "base_lr": "lr", "blr": "lr", "wd": "weight_decay", "epochs": "max_epochs",
    "gpus": "devices", "path": "root",
    "data_dir": "root", "directory": "root", "folder": "root", "workers": "num_workers",
}  # fmt: skip


class Override(NamedTuple):
    """A word such as ``key=value``, and what Hydra reads in it."""

    text: str
    parsed: Parsed

    @property
    def key(self) -> str:
        return str(self.parsed.key_or_group)

    @property
    def value(self) -> Any:
        return self.parsed.value()

    @property
    def deletes(self) -> bool:
        return bool(self.parsed.is_delete())

    @property
    def adds(self) -> bool:
        return self.text.startswith("+")

    @property
    def bare(self) -> str:
        """The word without the sign in front of it: ``key=value``."""
        return self.text.lstrip("+~")

    @property
    def is_pattern(self) -> bool:
        """Whether it names choices by a pattern: ``glob(sim*)``."""
        kind = self.parsed.value_type
        return kind is not None and kind.name == "GLOB_CHOICE_SWEEP"

    @property
    def names(self) -> list[str]:
        """The choices that a word of a group names; none where it leaves the group empty or sweeps over several."""
        if self.deletes or self.parsed.is_sweep_override() or self.value is None:
            return []
        return [str(name) for name in (self.value if isinstance(self.value, list) else [self.value])]

    def values(self) -> list[Any]:
        """All that it gives to its key: of a sweep several, of an interval its two ends.

        Raises:
            UserError: it is a pattern, for which there is nothing to choose from.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        if self.is_pattern:
            raise UserError(
                f"'{self.text}': glob(…) is for choices of a group; name values of {self.key}.", status=USAGE
            )
        if self.parsed.is_interval_sweep():
            return [self.value.start, self.value.end]
        if not self.parsed.is_sweep_override():
            return [self.value]
        parser = OverridesParser.create()
        return [parser.parse_override(f"x={text}").value() for text in self.parsed.sweep_string_iterator()]


# --- which key is meant ----------------------------------------------------------------------------------------------


def resolve_key(job: str, cfg: DictConfig, override: Override, retargeted: Sequence[str] = ()) -> list[str]:
    """The words by which Hydra sets a key: one that is there, or an argument that the thing configured takes as well.

    Args:
        cfg: composed without the values that are set.
        retargeted: parts whose ``_target_`` is set, too: they have the arguments of that one alone.

    Raises:
        UserError: there is no such key; names the nearest one. Or a value of another kind than stands there.
    """
    key, (parent, _, leaf) = override.key, override.key.rpartition(".")
    keys, node = list(flat_keys(cfg)), node_at(cfg, parent)
    if key not in keys and (meant := called_here(job, key, keys)) is not None:
        raise UserError(f"there is no key '{key}'. Did you mean '{meant}'?", status=USAGE)
    arguments = arguments_of(node, parent) if key not in keys or parent in retargeted else {}
    taken = leaf in arguments or (override.adds and takes_any(arguments))
    there = key in keys and (parent not in retargeted or leaf.startswith("_") or taken)
    if override.deletes:
        return _deleted(job, cfg, override) if there or leaf in arguments else _refuse(job, cfg, key, keys)
    if override.adds and override.value == {} and node_at(cfg, key) is not None:
        return [override.text]
    if leaf == "_target_" and _is_open(job, cfg, parent.rpartition(".")[0]):
        return [f"++{parent}={{}}", f"++{override.bare}"]
    if there and override.value == {}:  # to Hydra: add nothing to what is there
        return [f"~{key}", f"+{override.bare}"]
    if there:
        return [coerce_to_node_type(node, override)]
    if taken:
        return [f"+{_coerce_to_argument(arguments.get(leaf), override)}"]
    if _is_open(job, cfg, parent):
        for value in override.values():
            if not isinstance(value, dict) and not (isinstance(value, str) and "${" in value):
                raise UserError(
                    f"there is no key '{key}', and a thing of that name has to say what it is: "
                    f"{key}._target_=package.module.Class.",
                    status=USAGE,
                )
        return [f"+{override.bare}"]
    if override.adds and node is None and parent in job_groups(job):  # of what another run brings, which will refuse it
        return [override.text]
    return _refuse(job, cfg, key, keys)


def known_by_signature(cfg: DictConfig, parts: Iterable[str]) -> Iterator[str]:
    """Keys that the signatures of parts have, and the files need not name."""
    for part in parts:
        with contextlib.suppress(UserError):  # of another mistake than the one that is told of
            for name, argument in arguments_of(node_at(cfg, part), part).items():
                if argument.kind is not argument.VAR_KEYWORD:
                    yield f"{part}.{name}"


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, those inside others with a dot."""
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from flat_keys(child, f"{prefix}{key}.")


def node_at(cfg: DictConfig, key: str) -> DictConfig | None:
    """The part of a configuration that a key names; None where there is none, or a single value."""
    from omegaconf import DictConfig, OmegaConf

    node = OmegaConf.select(cfg, key, throw_on_missing=False) if key else cfg
    return node if isinstance(node, DictConfig) else None


def arguments_of(node: DictConfig | None, key: str) -> Mapping[str, Parameter]:
    """The arguments that the ``_target_`` of a part takes; none where it names nothing."""
    return parameters(node._target_, f"{key}._target_") if node is not None and "_target_" in node else {}


def _coerce_to_argument(argument: Parameter | None, override: Override) -> str:
    """The word, if its values are of the kind of an argument's default, or of one that its annotation names."""
    from omegaconf import OmegaConf

    if argument is None or not is_plain(argument.default):
        return override.bare
    said = str(argument.annotation)
    also = [kind for word, kind in (("str", str), ("Sequence", list), ("list", list), ("bool", bool)) if word in said]
    if "Any" in said or any(isinstance(value, tuple(also)) for value in override.values()):
        return override.bare
    return coerce_to_node_type(OmegaConf.create({argument.name: plain(argument.default)}), override)


def is_plain(value: object) -> bool:
    """Whether a default can stand in YAML."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)


def plain(value: Any) -> Any:
    """A default as YAML has it: tuples are lists there."""
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return {key: plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _is_open(job: str, cfg: DictConfig, key: str) -> bool:
    return key in OPEN and (key in cfg or key in job_groups(job) or node_at(cfg, key) is not None)


def _deleted(job: str, cfg: DictConfig, override: Override) -> list[str]:
    """The words by which Hydra takes a key away: an argument is at its default again, a part that jobs read is empty.

    Raises:
        UserError: the job cannot do without it.
    """
    from omegaconf import OmegaConf

    key, (parent, _, leaf) = override.key, override.key.rpartition(".")
    node = node_at(cfg, parent)
    if key in OPEN:
        return [f"~{key}", f"+{key}={{}}"]
    if not may_go(cfg, key):
        mended = "" if node_at(cfg, key) is not None else f"; give it a value: {key}=VALUE"
        raise UserError(f"`selfsight {job}` cannot do without {key}{mended}.", status=USAGE)
    if node is None or leaf not in node:
        return []
    return deletion(key, OmegaConf.select(node, leaf, throw_on_missing=False))


def deletion(key: str, value: object) -> list[str]:
    """The words that take away a key: to Hydra a null is not there, and what is not there cannot be deleted."""
    return [*([f"{key}=false"] if value is None else []), f"~{key}"]


def may_go(cfg: DictConfig, key: str) -> bool:
    """Whether a key can be left out: it is an argument, or one of several things by name."""
    parent = key.rpartition(".")[0]
    node = node_at(cfg, parent)
    return key in OPEN or parent in OPEN or (node is not None and "_target_" in node)


def _refuse(job: str, cfg: DictConfig, key: str, keys: Sequence[str]) -> NoReturn:
    """
    Raises:
        UserError: there is no such key; with the nearest one that nothing large has to be imported for, if there is
            one, else the nearest one of all that is configured.
    """
    at_hand = [*keys, *known_by_signature(cfg, ["trainer", key.rpartition(".")[0]])]
    hint = did_you_mean(job, key, at_hand)
    if not hint:
        parts = (each.rpartition(".")[0] for each in keys if each.endswith("._target_"))
        hint = did_you_mean(job, key, [*at_hand, *known_by_signature(cfg, parts)])
    raise UserError(f"there is no key '{key}'.{hint}", status=USAGE)


def did_you_mean(job: str, key: str, keys: Sequence[str], *, typed: bool = True) -> str:
    """The sentence that leads from a wrong key to the one that was meant; empty where none is near.

    Args:
        typed: on the command line, and not in a file of a choice.

    In this order: another program's name for it, a key of a choice that was not made, the same name elsewhere, a
    similar one beside it, a similar one anywhere.
    """
    groups = job_groups(job)
    if is_own_group(key) and key not in groups:
        return f" It is a group that this job does not ask for: +{key}=NAME adds it ({', '.join(choices(key))})."
    parent, _, leaf = key.rpartition(".")
    if (meant := called_here(job, key, keys)) is not None:
        return f" Did you mean '{meant}'?"
    if typed and (owners := choices_with(job, key)):
        return f" It belongs to {key.partition('.')[0]}={', '.join(owners)}."
    nodes = {inner.rpartition(".")[0] for inner in keys}
    single = [each for each in keys if each not in nodes]  # a part that holds others is no place for a value
    last = {each: each.rpartition(".")[2] for each in single}
    beside = [each for each in single if parent in nodes and each.rpartition(".")[0] == parent]
    if not parent:
        beside, last = [*groups, *beside], last | {group: group for group in groups}
    close = (
        [each for each in single if last[each] == leaf]
        or [each for name in near(leaf, [last[each] for each in beside], 0.5) for each in beside if last[each] == name]
        or near(key, [*single, *(groups if not parent else ())], 0.6)
        or [each for name in near(leaf, [*last.values()], 0.75) for each in single if last[each] == name]
    )
    return f" Did you mean '{close[0]}'?" if close else ""


def called_here(job: str, key: str, keys: Sequence[str]) -> str | None:
    """The key or group for which another program has this name; None where it is no such name."""
    parent, _, leaf = key.rpartition(".")
    called = [
        CALLED_ELSEWHERE.get(key),
        CALLED_IN_OTHER_JOBS.get(key),
        f"{parent}.{LEAF_ELSEWHERE[leaf]}" if leaf in LEAF_ELSEWHERE else None,
    ]
    return next((meant for meant in called if meant is not None and meant in (*keys, *job_groups(job))), None)


def near(word: str, among: Sequence[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, among, n=1, cutoff=cutoff)


def choices_with(job: str, key: str) -> list[str]:
    """The choices of a key's group whose file has this key, or names a thing that takes it."""
    from omegaconf import OmegaConf

    group, _, rest = key.partition(".")
    if group not in job_groups(job):
        return []
    found = {name: OmegaConf.create(content(file(group, name))) for name in choices(group, job)}
    return [
        name
        for name, node in found.items()
        if {key, rest} & {*flat_keys(node), *arguments_of(node.get(group, node), group)}
    ]


# --- which kind a value is of ----------------------------------------------------------------------------------------


def coerce_to_node_type(holder: Any, override: Override) -> str:
    """The word, if its values are of the kind that stands under its key; for a list, one value becomes a list of one.

    Raises:
        UserError: a word where a number stands, anything but true and false for a switch, one value for several.
    """
    from omegaconf import ListConfig

    node, word = holder._get_node(override.key.rpartition(".")[2]), override.bare
    if node is None or node._is_none() or node._is_interpolation() or node._is_missing():
        return word
    known = [value for value in override.values() if not (isinstance(value, str) and "${" in value)]
    for value in known:
        check_kind(override.key, node, value)
    if not isinstance(node, ListConfig) or all(value is None or isinstance(value, (list, dict)) for value in known):
        return word
    parsed = override.parsed
    texts = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [parsed.get_value_element_as_str()]
    return f"{override.key}={','.join(text if text.startswith('[') else f'[{text}]' for text in texts)}"


def check_kind(key: str, node: Any, new: object) -> None:
    """Refuse one value for several, what is no number for a number, and anything but true, false, auto for a switch."""
    from omegaconf import DictConfig, ListConfig

    if isinstance(node, DictConfig) and not isinstance(new, dict):
        inner = [name for name in map(str, node) if not name.startswith("_")]
        several = ", ".join(f"{key}.{name}" for name in inner[:3])
        aside = (
            f", or leave it out: ~{key}" if new is None and may_go(cast("DictConfig", node._get_root()), key) else ""
        )
        raise UserError(f"{key} holds several values ({several}, …); set one of them{aside}.", status=USAGE)
    old = None if isinstance(node, (DictConfig, ListConfig)) else node._value()
    if isinstance(old, bool) and not isinstance(new, bool) and new != "auto":
        raise UserError(f"{key} is '{new}'; true or false was expected.", status=USAGE)
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if new == "auto" and key.startswith("trainer."):  # whether it can be that one `TrainerOptions` knows
        return
    if number and new is not None and (isinstance(new, bool) or not isinstance(new, (int, float))):
        raise UserError(f"{key} is '{new}'; a number was expected.", status=USAGE)
