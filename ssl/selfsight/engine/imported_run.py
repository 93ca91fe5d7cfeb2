"""A run folder out of a checkpoint of someone else's, as if the run had been stopped there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from selfsight.checkpoints.formats import Imported, listed
from selfsight.engine import build
from selfsight.engine.build import Parts
from selfsight.engine.checkpointing import AtomicCheckpoints
from selfsight.errors import USAGE, UserError
from selfsight.methods.base import Method
from selfsight.optim import LAMB, LARS
from selfsight.runs.folder import RunFolder

KEPT_ON = "the state of the optimiser goes on"

#: what each optimiser keeps of a parameter
KEPT: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    LARS: ("momentum_buffer",),
    LAMB: ("exp_avg", "exp_avg_sq"),
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Adam: ("step", "exp_avg", "exp_avg_sq"),
}


def begin_with(imported: Imported, cfg: DictConfig, out: Path, epoch: int | None) -> list[str]:
    """Write the run folder of a configuration, with the state of the method from the file.

    Args:
        out: the folder that is told of in what is refused.
        epoch: how many epochs are done; None: as many as the file says where its optimiser's state is kept, else 0.
    Returns:
        What was decided, a sentence each.

    Raises:
        UserError: the method as it is configured has other tensors.
    """
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
