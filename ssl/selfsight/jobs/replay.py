"""`selfsight replay`: the step at which a run went wrong, done again; which tensor was no number first."""

from __future__ import annotations

import contextlib

import torch
from omegaconf import DictConfig
from torch import nn

from selfsight.contracts import SemiBatch
from selfsight.datamodules import DataModule, SemiDataModule
from selfsight.engine import build, teacher_features
from selfsight.engine.broken_step import BrokenStep
from selfsight.engine.checkpointing import seed_step
from selfsight.engine.devices import device
from selfsight.engine.first_wrong import first_wrong
from selfsight.engine.reload import classifier_of, method_with
from selfsight.errors import UserError
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder

TOLD = 8  # images named, at most
TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def run(cfg: DictConfig) -> None:
    """Do the step again with the state, the batch and the random numbers that it had."""
    folder = RunFolder.open(cfg.run)
    if not folder.broken_step.is_file():
        raise UserError(
            f"'{folder.path}' has kept no step that went wrong; one is kept when a run stops because loss or gradient "
            "became no number."
        )
    broken, of_run, where = BrokenStep.read(folder.broken_step), folder.config_to_resume(), device(cfg.accelerator)
    data = build.datamodule(of_run, folder)
    teacher = classifier_of(RunFolder.open(of_run.teacher))[0] if "teacher" in of_run else nn.Identity()
    method = method_with(broken.state, of_run, data, teacher)
    method.configure(build.recipe(of_run), build.length(of_run, data)).to(where).train()
    teacher_features.give(method, data, folder.path)
    seed_step([broken.seed, broken.epoch, broken.batch, 0], where)
    kind = TYPES.get(broken.precision)
    with torch.autocast(where.type, kind) if kind is not None else contextlib.nullcontext():
        loss, found = first_wrong(method, broken.whole.to(where), broken.step)
    console = make_console()
    console.print(
        f"epoch {broken.epoch + 1}, step {broken.step}: {broken.cause}; the loss was {broken.loss:g}, done again it is "
        f"{loss:g}\nimages: {names(data, broken)}",
        markup=False,
    )
    console.print(
        f"first: {found}"
        if found
        else "nothing goes wrong here: what made it is neither in the state nor in the batch (the machine, a kernel of "
        "its device, or the share of another process)",
        markup=False,
    )


def names(data: DataModule, broken: BrokenStep) -> str:
    """The images of the batch, those that a method learns from without labels where there are both."""
    whole = broken.whole
    images = data.unlabelled.images if isinstance(data, SemiDataModule) else data.images
    indices = (whole.unlabelled if isinstance(whole, SemiBatch) else whole).indices.tolist()
    more = f" and {len(indices) - TOLD} more" if len(indices) > TOLD else ""
    return ", ".join(images.name(index) for index in indices[:TOLD]) + more
