"""What a configuration leaves to the signatures of the things it names: filled in, so that every key can be seen.

A default has one home, the signature. A file states what its name makes different.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

from selfsight.composition.catalogue import chain, conf_dir, content, defaults, files, job_groups
from selfsight.composition.keys import did_you_mean, flat_keys, is_plain, plain
from selfsight.composition.targets import check_kind_of, locate, parameters, takes_any
from selfsight.errors import USAGE, UserError

if TYPE_CHECKING:
    from pathlib import Path

#: arguments that a run gives itself, by the part they belong to: nobody has to, and nothing stands for them
GIVEN: Mapping[str, tuple[str, ...]] = {
    "method": (
        "backbone", "projector", "teacher", "num_classes", "num_images", "num_unlabelled", "labels", "batch_size",
        "mean", "std",
    ),
    "datamodule": ("data", "views", "compile", "channels_last", "device", "worker_share"),
    "optimizer": ("params",),
    "logger": ("save_dir",),
    "evaluator": ("head",),
    "detection": ("data", "optimizer"),
}  # fmt: skip

#: keys that a job reads where they are there
READ_IF_THERE = ("job", "choices", "then", "steps", "labels", "mu", "steps_per_epoch", "debug", "hydra")

NOTHING = object()


def complete(cfg: DictConfig, job: str) -> None:
    """Fill in what the signatures say and the configuration does not; what they leave open, too, is to be given.

    Raises:
        UserError: a key that nothing reads, or a target that there is not or that is no part of this kind.
    """
    for key in cfg:
        if str(key) not in _keys_of(job, cfg):
            _refuse(job, cfg, str(key))
    with flag_override(cfg, "struct", False):
        for key, node in _parts(cfg):
            _complete(job, cfg, key, node)


def stated(node: DictConfig) -> DictConfig:
    """A part without what its signature says anyway."""
    found = OmegaConf.create(OmegaConf.to_container(node))
    assert isinstance(found, DictConfig)
    found._set_parent(node._get_parent())
    OmegaConf.set_struct(found, False)
    for key, part in _parts(found):
        arguments = parameters(part._target_, f"{key}._target_")
        for name in [str(name) for name in part]:
            value: Any = part._get_node(name)
            default = arguments[name].default if name in arguments else NOTHING
            given = OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value._value()
            if is_plain(default) and given == plain(default):
                del part[name]
    return found


def differences(group: str, choice: str, node: DictConfig) -> tuple[str, dict[str, object]]:
    """What a part is called, and which of its values differ from those of the choice it was composed from.

    Something of a person's own, whose ``_target_`` has taken the place of the choice's, is called by its class.
    """
    now = dict(_flat(OmegaConf.to_container(stated(node), resolve=True)))
    found = [path for _, path in files(group, choice)]
    usual = dict(_flat(OmegaConf.to_container(stated(OmegaConf.load(found[-1]))))) if found else {}  # type: ignore[arg-type]
    target = str(now.get("_target_"))
    if not found or str(usual.get("_target_")) != target:
        return target.rpartition(".")[2].lower(), {key: value for key, value in now.items() if key != "_target_"}
    referring = {key for key, value in usual.items() if isinstance(value, str) and "${" in value}
    return choice, {k: v for k, v in now.items() if k not in referring and v != usual.get(k, NOTHING)}


def presets_line(cfg: DictConfig) -> str | None:
    """``values for digits: 30 prototypes, …``: what was chosen in silence for a data set and a method; None if nothing.

    A value that something else has set differently is left out, and so are the many numbers of views.
    """
    name = (cfg.get("choices") or {}).get("presets")
    if name is None:
        return None
    now = dict(_flat(OmegaConf.to_container(cfg)))
    told = []
    for path in _taken_in("presets", str(name)):
        values = dict(_flat(OmegaConf.to_container(OmegaConf.load(path))))
        kept = {key: value for key, value in values.items() if value is not None and now.get(key, NOTHING) == value}
        first = [key for key in kept if key.startswith("method.")]
        rest = [key for key in kept if not key.startswith(("method.", "views.", "evaluator."))]
        told += [_told(key, kept[key]) for key in [*first, *rest]]
        told += ["views of its own"] if any(key.startswith("views.") for key in kept) else []
    where = str(name).rpartition("/")[0] or str(name)
    return f"values for {where}: {', '.join(told)} (presets=null: without them)" if told else None


def _flat(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _told(key: str, value: object) -> str:
    parent, _, leaf = key.rpartition(".")
    if leaf == "_target_":
        return f"{parent} {str(value).rpartition('.')[2]}"
    if leaf.startswith("num_"):
        return f"{value} {leaf.removeprefix('num_')}"
    return f"{key.removeprefix('schedule.') if parent.startswith('schedule') else leaf} {value}"


# --- parts -----------------------------------------------------------------------------------------------------------


def _parts(node: object, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every part with a ``_target_``, the outer ones first."""
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            yield from _parts(node._get_node(i), f"{prefix}[{i}]")
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    if "_target_" in node:
        yield prefix, node
    for key in list(node):
        yield from _parts(node._get_node(key), f"{prefix}.{key}" if prefix else str(key))


def _complete(job: str, cfg: DictConfig, key: str, node: DictConfig) -> None:
    group = key.partition(".")[0]
    check_kind_of(group, node._target_, key)
    arguments = parameters(node._target_, f"{key}._target_")
    given = {*GIVEN.get(group, ()), *getattr(locate(node._target_), "needs", ())}
    for name in [str(name) for name in node if not str(name).startswith("_")]:
        if name not in arguments and _is_null(node, name):  # an option of another choice, taken away
            del node[name]
        elif name not in arguments and not takes_any(arguments) and _is_ours(cfg, f"{key}.{name}"):
            del node[name]  # of a schedule or optimiser that somebody has chosen another one for
        elif name not in arguments and not takes_any(arguments):
            _refuse(job, cfg, f"{key}.{name}", list(arguments))
    for name, argument in arguments.items():
        if name in node or name in given or argument.kind is argument.VAR_KEYWORD:
            continue
        if argument.default is argument.empty:
            if not node.get("_partial_", False):
                node[name] = "???"
        elif is_plain(argument.default):
            node[name] = plain(argument.default)


# --- keys ------------------------------------------------------------------------------------------------------------


def _keys_of(job: str, cfg: DictConfig) -> set[str]:
    own = {key for path in chain(job) for key in content(path)}
    return {*own, *job_groups(job), *READ_IF_THERE, *(group for group in cfg.get("choices") or {})}


def _refuse(job: str, cfg: DictConfig, key: str, arguments: list[str] | None = None) -> None:
    """
    Raises:
        UserError: nothing reads this key; names the file that has it, where that is known, and the nearest key.
    """
    parent = key.rpartition(".")[0]
    keys = [*(each for each in flat_keys(cfg) if each != key), *(f"{parent}.{name}" for name in arguments or ())]
    place = next((f" ({path})" for path in _files_of(cfg) if _states(path, key)), "")
    raise UserError(f"there is no key '{key}'{place}.{did_you_mean(job, key, keys, typed=not place)}", status=USAGE)


def _files_of(cfg: DictConfig) -> Iterator[Path]:
    """The files of what was chosen, and those that they take in whole."""
    for group, choice in (cfg.get("choices") or {}).items():
        for name in choice if isinstance(choice, ListConfig) else [choice]:
            yield from _taken_in(str(group), str(name))


def _taken_in(group: str, choice: str) -> Iterator[Path]:
    """The files of a choice, and those that they take in whole."""
    for _, path in files(group, choice):
        yield path
        for inner in defaults(path):
            yield from (taken for _, taken in files(group, str(inner.choice)) if inner.group is None)


def _is_ours(cfg: DictConfig, key: str) -> bool:
    """Whether a file of the package's own states a key."""
    return any(path.is_relative_to(conf_dir()) and _states(path, key) for path in _files_of(cfg))


def _states(path: Path, key: str) -> bool:
    found = set(flat_keys(OmegaConf.create(content(path))))
    return key in found or key.partition(".")[2] in found


def _is_null(node: DictConfig, name: str) -> bool:
    return not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name) and node[name] is None
