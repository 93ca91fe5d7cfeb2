"""`selfsight import`: anyone's checkpoint as a backbone of ours, or as a run that goes on where its authors stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfsight.checkpoints import formats
from selfsight.checkpoints.architecture import shown
from selfsight.checkpoints.export import export_backbone, is_ours
from selfsight.checkpoints.formats import Imported, listed
from selfsight.checkpoints.importing import built, description, made
from selfsight.checkpoints.load import beyond_defaults
from selfsight.composition.overrides import compose_with
from selfsight.engine.imported_run import KEPT_ON, begin_with
from selfsight.engine.options import resolved
from selfsight.errors import USAGE, UserError
from selfsight.runs.console import make_console

OPTIMISER = "state of the optimiser"


def run(cfg: DictConfig) -> None:
    """Read the file, say what was found and what is left out, write the folder."""
    out = Path(cfg.out).expanduser()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"'{out}' exists already and is not empty; name another folder: out=DIR.")
    imported = formats.read(cfg.source, backbone=network(cfg.get("backbone")), trust=bool(cfg.trust))
    given = {key: cfg[key] for key in ("image_size", "mean", "std") if cfg[key] is not None}
    spec = description(imported, Path(cfg.source).name, **given)
    words = split(cfg.pretrain)
    told = [*imported.told]
    if words:
        told += write_run(imported, out, words, cfg.epoch)
    export_backbone(built(imported), spec, made(out))
    report(imported, spec, out, told, words)


def network(node: DictConfig | None) -> dict[str, Any] | None:
    """Arguments of `selfsight.backbones.registry.create` for the network that is named, with what is not its default.

    Raises:
        UserError: it is one of a person's own, which a folder for everyone cannot name.
    """
    if node is None:
        return None
    arguments = resolved(node)
    if not is_ours(arguments):
        raise UserError(
            f"backbone._target_ is '{arguments['_target_']}', and import takes networks by name; begin a run of this "
            "one with the file: selfsight pretrain init_from=FILE backbone._target_=…"
        )
    return beyond_defaults(arguments)


def split(words: str | None) -> list[str]:
    """The words in one text, as a shell takes them apart.

    Raises:
        UserError: a quotation that does not end.
    """
    try:
        return shlex.split(words or "")
    except ValueError as error:
        raise UserError(f"the words of pretrain={words} cannot be told apart ({error}).", status=USAGE) from None


def report(
    imported: Imported, spec: Mapping[str, object], out: Path, told: Sequence[str], words: Sequence[str]
) -> None:
    """What the file was, what of it is used, and how to go on."""
    console = make_console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    assumed = f"images of {spec['image_size']} pixels, mean {spec['mean']}, std {spec['std']}"
    say(f"{imported.format.title}: {shown(imported.spec)}, {len(imported.backbone)} tensors; {assumed}")
    for reason, names in imported.unused.items():
        if reason == OPTIMISER and KEPT_ON in " ".join(told):
            continue
        say(f"left out, {reason}: {len(names)} ({listed(names)})")
    for line in told:
        say(line)
    if words:
        say(f"{out}: selfsight pretrain resume={out} goes on")
        return
    say(f"{out}: selfsight knn weights={out} dataset=…, export weights={out} format=…, or pretrain init_from={out}")
    rest = sorted({name.partition(".")[0] for name in imported.state if not name.startswith(imported.format.network)})
    if rest:
        say(
            f"its {listed(rest, 6)} are in the file, too: to go on with {imported.format.method} from them, name the "
            'images, as in pretrain="dataset=folder dataset.root=DIR"'
        )


def write_run(imported: Imported, out: Path, words: Sequence[str], epoch: int | None) -> list[str]:
    """A run folder with the state of the method, as if the run had been stopped there.

    Args:
        words: for ``selfsight pretrain``; they come after those that follow from the file.
        epoch: how many epochs are done; None: as many as the file says where its optimiser's state is kept, else 0.
    Returns:
        What was decided, a sentence each.

    Raises:
        UserError: the file holds the network alone, or the method as it is configured has other tensors.
    """
    if not imported.state:
        raise UserError(
            f"the file holds no state of a method ({imported.format.title}), so that no run can go on from it; leave "
            f"pretrain= out, and begin one with its backbone: selfsight pretrain init_from={out}."
        )
    settings = {"backbone": {"_target_": "selfsight.backbones.registry.create", **imported.spec}}
    cfg = compose_with(
        "pretrain", [*imported.settings, *words], {**settings, "runs": str(out.parent), "name": out.name}
    )
    return begin_with(imported, cfg, out, epoch)
