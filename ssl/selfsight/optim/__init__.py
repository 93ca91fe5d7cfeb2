"""Optimisers, parameter groups and schedules. What PyTorch has (SGD, AdamW) is used from there."""

from selfsight.optim.groups import all_parameters, l2_penalty, layer_decayed, outside_batchnorm, split_no_decay
from selfsight.optim.lamb import LAMB
from selfsight.optim.lars import LARC, LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.sam import SAM
from selfsight.optim.schedule import Clock, Schedule

__all__ = [
    "LAMB",
    "LARC",
    "LARS",
    "SAM",
    "Clock",
    "OptimizationRecipe",
    "Schedule",
    "all_parameters",
    "l2_penalty",
    "layer_decayed",
    "outside_batchnorm",
    "split_no_decay",
]
