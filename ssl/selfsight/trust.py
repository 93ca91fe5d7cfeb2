"""What a configuration that comes from disk may build. A run folder is data, whoever made it.

A ``_target_`` names anything that Python can import, and building it runs it. So one that was read from a file may only
name what its node is made of, told by its path alone, before anything of it is imported: a path that leads through a
module to what that module has imported fits none of `PARTS`. What the person names in the same command, what an
installed plug-in defines, and what ``trust=true`` stands behind is built as well.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from selfsight import plugins
from selfsight.errors import UserError

CLASS = r"[A-Z]\w*"

DATASETS = (
    r"selfsight\.datamodules\.(datasets\.(folders|fractals|sources)\.|sources\.)?"
    r"(cifar10|cifar100|digits|fashion_mnist|folder|fractals|imagenet|imagenet100|imagenette|shapes|stl10|svhn)",
)
DATAMODULES = (r"selfsight\.datamodules\.((module|semi)\.)?[A-Z]\w*DataModule",)
VIEWS = (r"selfsight\.datamodules\.views\.(view\.)?View", rf"torchvision\.transforms\.(v2\.)?{CLASS}")
NETWORKS = (
    r"selfsight\.backbones\.registry\.create",
    rf"selfsight\.backbones\.\w+\.{CLASS}",
    rf"torch\.nn\.(modules\.\w+\.)?{CLASS}",
    r"torchvision\.models\.(?!_|get_|list_)\w+",
    r"timm\.(models\.)?create_model",
    rf"timm\.models\.(?!_)\w+\.{CLASS}",
)
METHODS = (rf"selfsight\.methods\.(semi\.)?\w+\.{CLASS}",)
OPTIMIZERS = (rf"torch\.optim\.(lr_scheduler\.)?{CLASS}", rf"selfsight\.optim\.(\w+\.)?{CLASS}")
SCHEDULES = (rf"selfsight\.optim\.schedule\.({CLASS}|teacher_momentum)",)
EVALUATORS = (
    rf"selfsight\.evaluation\.((probes|dense|detection)\.)?\w+\.{CLASS}",
    rf"selfsight\.evaluation\.{CLASS}",
    r"selfsight\.evaluation\.(dense\.)?segmentation\.(shapes|folder|voc)",
    r"selfsight\.evaluation\.(detection\.)?coco\.coco",
)

#: part of a configuration: what it and the parts inside it are made of
PARTS: Mapping[str, tuple[str, ...]] = {
    "method": (*METHODS, *NETWORKS),
    "batches": (r"selfsight\.engine\.stages\.Stages",),
    "heads": (r"selfsight\.methods\.matryoshka\.Matryoshka",),
    "backbone": NETWORKS,
    "dataset": DATASETS,
    "datamodule": DATAMODULES,
    "views": VIEWS,
    "optimizer": OPTIMIZERS,
    "schedule": (*SCHEDULES, *OPTIMIZERS),
    "evaluator": (*EVALUATORS, *VIEWS),
    "trainer": (r"selfsight\.engine\.options\.TrainerOptions",),
    "callbacks": (
        rf"lightning\.pytorch\.callbacks\.{CLASS}",
        r"selfsight\.evaluation\.callbacks\.OnlineEvaluation",
        r"selfsight\.engine\.curriculum\.EfficientTrain",
    ),
    "logger": (rf"lightning\.pytorch\.loggers\.{CLASS}",),
}

#: what builds networks and takes more arguments than those that describe one
BUILDERS = re.compile(r"timm\.|torchvision\.models\.|selfsight\.backbones\.registry\.", re.ASCII)
#: arguments by which they open files and addresses
OPENERS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
#: arguments by which they fetch weights, and those that stand in no order that tells which is which
FETCHERS = ("_args_", "weights", "weights_backbone", "pretrained_backbone")
#: parts whose ``name`` is one of a network; to timm one with a colon is a file or an address
OF_NETWORKS = ("backbone", "method")


@dataclass(frozen=True)
class Trust:
    """Whom a command trusts.

    Attributes:
        everything: any folder that it reads. named: targets that it names itself.
    """

    everything: bool = False
    named: frozenset[str] = frozenset()


NOBODY = Trust()
_given: ContextVar[Trust] = ContextVar("trust", default=NOBODY)


@contextlib.contextmanager
def trusting(more: Trust) -> Iterator[None]:
    """Trust this, too, while it lasts."""
    before = _given.get()
    token = _given.set(Trust(before.everything or more.everything, before.named | more.named))
    try:
        yield
    finally:
        _given.reset(token)


def given() -> Trust:
    """What is trusted now."""
    return _given.get()


def targets(content: object) -> frozenset[str]:
    """All that a configuration names to be built."""
    return frozenset(str(node["_target_"]) for _, node in _nodes(content) if "_target_" in node)


def check(content: Mapping[str, object], place: object) -> None:
    """Refuse a configuration from disk that could do more than describe a run.

    Args:
        content: as plain containers, references as they are written. place: where it was read.

    Raises:
        UserError: it names what its parts are not made of, or hides what it names; says which, and what to do.
    """
    if _given.get().everything:
        return
    for key, node in _nodes(content):
        if "_target_" in node and not _may_build(key, node["_target_"]):
            _refuse(place, f"build '{node['_target_']}' ({key}._target_)")
        builder = str(node.get("_target_", ""))
        closed = OPENERS + (FETCHERS if BUILDERS.match(builder) else ())
        if BUILDERS.match(builder) and not builder.startswith("selfsight."):  # ours is told not to, where it is loaded
            closed += ("pretrained",)
        for name, value in node.items():
            if name in closed and value not in (None, False):
                _refuse(place, f"open what {key}.{name} names")
            if name in ("name", "model_name") and _root(key) in OF_NETWORKS and ":" in str(value):
                _refuse(place, f"fetch '{value}' ({key}.{name})")
    for key, text in _texts(content):
        if "${" in text:
            _refuse(place, f"look up '{text}' ({key})")
        if key.startswith("then.") and any(word in text for word in ("_target_", "hydra", "trust", *OPENERS, "_args_")):
            _refuse(place, f"start a job with '{text}' ({key})")


def _may_build(key: str, target: object) -> bool:
    allowed = PARTS.get(_root(key), ())
    return isinstance(target, str) and (
        any(re.fullmatch(pattern, target, re.ASCII) for pattern in allowed)
        or target in _given.get().named
        or plugins.defines(target)
    )


def _root(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


def _refuse(place: object, what: str) -> None:
    raise UserError(
        f"'{place}' would {what}, and a file may only build selfsight's own parts and those of torch, torchvision, "
        "timm and Lightning, each in its place; if it is code of your own, or you know who made the folder, add "
        "trust=true."
    )


def _nodes(content: object, key: str = "") -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every mapping in a configuration, and where it stands."""
    if isinstance(content, Mapping):
        yield key, content
    for inner, value in _inside(content, key):
        yield from _nodes(value, inner)


def _texts(content: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a configuration, names of keys included, and where it stands."""
    if isinstance(content, str):
        yield key, content
    if isinstance(content, Mapping):
        yield from ((key, str(name)) for name in content)
    for inner, value in _inside(content, key):
        yield from _texts(value, inner)


def _inside(content: object, key: str) -> Iterable[tuple[str, object]]:
    if isinstance(content, Mapping):
        return ((f"{key}.{name}" if key else str(name), value) for name, value in content.items())
    if isinstance(content, (list, tuple)):
        return ((f"{key}[{i}]", value) for i, value in enumerate(content))
    return ()
