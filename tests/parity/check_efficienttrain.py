"""The numbers of EfficientTrain and EfficientTrain++ (LeapLabTHU/EfficientTrain)."""

from __future__ import annotations

import torch

from selfsight.datamodules.views.frequency import lanczos, low_frequencies
from selfsight.nn.positions import resize_positions
from selfsight.optim.curriculum import compute_stages, stages
from selfsight.optim.schedule import Cosine, Warmup

from .harness import Case, family
from .networks import one_epoch_steps, rates_of

TOLERANCE = 1e-9


@family("efficienttrain", "lowfreq_")
def low_pass(case: Case) -> None:
    x, band = case.tensor("x"), case.number("band")
    case.compare("y", low_frequencies(x, band), TOLERANCE)
    single = low_frequencies(x.float(), band)
    assert single.dtype == torch.float32
    case.compare("y", single, 1e-5)


@family("efficienttrain", "stages_")
def five_stages(case: Case) -> None:
    found = stages(case.number("epochs"))
    case.compare("band", [stage.size for stage in found], 0)
    case.compare("magnitude", [stage.magnitude for stage in found], 0)
    case.compare("end_epoch", [stage.end for stage in found], 0)


@family("efficienttrain", "plusplus_")
def equal_compute(case: Case) -> None:
    found = compute_stages(case.number("epochs"), case.number("size"))
    case.compare("stage_epochs", [stage.schedule_epochs for stage in found], 0)
    case.compare("start_epoch", [stage.start for stage in found], 0)
    case.compare("end_epoch", [stage.end for stage in found], 0)
    case.compare("magnitude", [stage.magnitude for stage in found], 0)


@family("efficienttrain", "lr_")
def learning_rate(case: Case) -> None:
    n, base = case.number("steps_per_epoch"), case.number("base")
    warm = case.number("warmup_steps")
    epochs = case.number("warmup_epochs") if warm < 0 else warm / n
    cosine = Cosine(1.0, case.number("final") / base)
    schedule = Warmup(epochs, case.number("start") / base, cosine, ends="both")
    case.compare("lr", rates_of(schedule, one_epoch_steps(n, case.number("epochs")), base), TOLERANCE)


@family("efficienttrain", "posembed_")
def positions(case: Case) -> None:
    new, patch = case.number("new_size"), case.number("patch")
    for name in case.inp:
        resized = resize_positions(case.tensor(name), (new, new), patch, rule="bilinear")
        case.compare(name, resized, TOLERANCE)


@family("efficienttrain", "lanczos_")
def resized(case: Case) -> None:
    case.compare("image", lanczos(case.inp["image"].astype("uint8"), case.number("size")), 0)
