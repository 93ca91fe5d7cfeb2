"""`selfsight import`: anyone's checkpoint as a backbone of ours, or as a run that goes on where its authors stopped."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from selfsight.backbones.registry import create
from selfsight.checkpoints import formats
from selfsight.checkpoints.architecture import shown
from selfsight.checkpoints.export import export_backbone, is_ours
from selfsight.checkpoints.formats import Imported, listed
from selfsight.checkpoints.importing import built, description, made
from selfsight.engine import build
from selfsight.engine.build import Parts
from selfsight.engine.checkpointing import AtomicCheckpoints
from selfsight.engine.options import resolved
from selfsight.errors import USAGE, UserError
from selfsight.jobs.pipeline import composed
from selfsight.methods.base import Method
from selfsight.optim import LAMB, LARS
from selfsight.runs.console import make_console, quiet
from selfsight.runs.folder import RunFolder

OPTIMISER, KEPT_ON = "state of the optimiser", "the state of the optimiser goes on"

#: what each optimiser keeps of a parameter
KEPT: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    LARS: ("momentum_buffer",),
    LAMB: ("exp_avg", "exp_avg_sq"),
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Adam: ("step", "exp_avg", "exp_avg_sq"),
}


def run(cfg: DictConfig) -> None:
    """Read the file, say what was found and what is left out, write the folder."""
    quiet()
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
    usual = {name: parameter.default for name, parameter in inspect.signature(create).parameters.items()}
    return {k: v for k, v in arguments.items() if k != "_target_" and (k not in usual or v != usual[k])}


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


# --- a run that goes on ----------------------------------------------------------------------------------------------


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
    cfg = composed("pretrain", [*imported.settings, *words], {**settings, "runs": str(out.parent), "name": out.name})
    parts = build.parts(cfg)
    method = parts.method
    told = take_over(method, imported, out)
    method.configure(parts.recipe, parts.length)
    folder = RunFolder.create(cfg, stem=imported.format.method or "run")
    try:
        told += save(parts, imported, folder, epoch)
    except BaseException:
        folder.drop_unused()
        raise
    return told


def take_over(method: Method, imported: Imported, out: Path) -> list[str]:
    """Give the method its state out of the file; what the file does not keep begins as in a new run.

    Raises:
        UserError: the method as it is configured has other tensors.
    """
    ours, theirs = method.state_dict(), imported.state
    name, anew = type(method).__name__, "|".join(imported.format.anew)
    missing = [key for key in ours if key not in theirs]
    lacking = [key for key in missing if not re.fullmatch(anew, key)]
    over = [key for key in theirs if key not in ours]
    other = [key for key in theirs if key in ours and ours[key].shape != theirs[key].shape]
    if other and not over and not lacking:
        raise UserError(other_shape(method, other[0], theirs[other[0]], ours[other[0]], out))
    if wrong := [*over, *lacking, *other]:
        raise UserError(
            f"{name} as these words make it has other tensors than the file: {len(over)} of the file's have no place, "
            f"{len(lacking)} are missing in it, '{wrong[0]}' for one; leave out words that change method.*, or begin "
            f"with its backbone alone: selfsight pretrain init_from={imported.format.method}…"
        )
    method.load_state_dict({**ours, **theirs})
    return [f"beginning anew, as the file does not keep it: {listed(missing, 6)}"] if missing else []


def other_shape(method: Method, key: str, theirs: Tensor, ours: Tensor, out: Path) -> str:
    """One sentence on a tensor of another shape: the number of classes, of labelled images, or what a word changed."""
    alone = "import the file without pretrain=, and begin a run with its backbone: init_from=DIR"
    here = getattr(method, "num_classes", None)
    labelled = getattr(method, "num_labelled", None)
    if re.search(r"(classifier|fc|u_labels|\bda\b)", key):
        classes = (theirs.shape[-1], ours.shape[-1]) if key in ("da", "u_labels.data") else (len(theirs), len(ours))
        return f"the file is of {classes[0]} classes ('{key}') and these images have {here or classes[1]}; {alone}."
    if labelled is not None and len(theirs) != len(ours):
        return f"the file is of {len(theirs)} labelled images ('{key}') and here are {labelled}; {alone}."
    return f"'{key}' is {[*theirs.shape]} in the file and {[*ours.shape]} here; leave out the word that changes it."


def save(parts: Parts, imported: Imported, folder: RunFolder, epoch: int | None) -> list[str]:
    """Write the checkpoint of a run that has done ``epoch`` epochs; returns what was decided."""
    method, epochs = parts.method, parts.length.epochs
    told, words = kept_words(method.configure_optimizers(), imported)
    done = epoch if epoch is not None else (imported.epochs or 0) if words else 0
    if done >= epochs:
        if epoch is not None:
            raise UserError(
                f"epoch is {epoch}, and the run has {epochs} epochs, so that none is left; add trainer.max_epochs=N to "
                "pretrain=.",
                status=USAGE,
            )
        told.append(f"the file has seen {done} epochs and the run has {epochs}: its schedule begins anew")
        done = 0
    if done:
        told.append(f"goes on after epoch {done} of {epochs}")
    parts.datamodule.load_state_dict({"epoch": done, "batch": 0})
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        plugins=[AtomicCheckpoints()],
    )  # fmt: skip
    trainer.fit(method, datamodule=parts.datamodule)  # no step: it brings method, optimiser and images together
    fill(trainer.optimizers[0], method, imported, words)
    set_counters(trainer, done, done * parts.length.steps_per_epoch)
    trainer.save_checkpoint(folder.checkpoint)
    return told


def kept_words(optimizer: Optimizer, imported: Imported) -> tuple[list[str], tuple[str, ...]]:
    """What the optimiser keeps of a parameter and the file has, in its words; none where they differ, which is told."""
    if not imported.slots:
        return [], ()
    words = next((words for kind, words in KEPT.items() if isinstance(optimizer, kind)), ())
    found = next(iter(imported.slots.values()))
    if words and set(words) <= set(found):
        return [f"{KEPT_ON}: {', '.join(words)}"], words
    mine = type(optimizer).__name__
    return [f"the file's optimiser keeps {listed(found)}, which {mine} does not go by: it begins anew"], ()


def fill(optimizer: Optimizer, method: Method, imported: Imported, words: Sequence[str]) -> None:
    """Give the optimiser what the file's one kept of each parameter."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slot = imported.slots.get(names[parameter])
            if words and slot is not None:
                optimizer.state[parameter] = {word: placed(slot[word], parameter, word) for word in words}
                if isinstance(optimizer, LAMB) and "step" in slot:  # it counts for all parameters of a group together
                    group["step"] = int(slot["step"])


def placed(value: Tensor, parameter: Tensor, word: str) -> Tensor:
    return value.to(torch.float32) if word == "step" else value.to(parameter.dtype).reshape(parameter.shape).clone()


def set_counters(trainer: Trainer, epoch: int, step: int) -> None:
    """Bring Lightning's counters to the end of an epoch: `save_checkpoint` writes them down, `fit` goes on there."""
    loop = trainer.fit_loop
    counts: Any = (loop.epoch_progress.current, loop.epoch_progress.total)
    for count in counts:
        count.ready = count.started = count.processed = count.completed = epoch
    inner = loop.epoch_loop
    for progress in (inner.batch_progress, inner.automatic_optimization.optim_progress.optimizer.step):
        progress.total.ready = progress.total.completed = step
    inner._batches_that_stepped = step
