"""DINO's targets and loss (Caron et al. 2021, section 3.1; facebookresearch/dino, main_dino.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.losses.swav import swapped_prediction
from selfsight.nn.precision import full_precision


@full_precision
@torch.no_grad()
def centred_softmax(scores: Tensor, centre: Tensor, *, temperature: float) -> Tensor:
    """The teacher's distributions ``softmax((t - c) / tau_t)``: the centre keeps one dimension from winning always,
    the low temperature keeps all from being alike.

    Args:
        scores: ``[..., K]``. centre: ``[K]``.

    Raises:
        UserError: the temperature is not positive.
    """
    if temperature <= 0:
        raise UserError(f"DINO's teacher temperature is {temperature}; it has to be above 0 (0.04 to 0.07).")
    return ((scores - centre) / temperature).softmax(-1)


@full_precision
def dino(student: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Every crop predicts the teacher's distribution for each other global crop.

    ``L = 1/|G| sum_{a in G} 1/(M-1) sum_{v != a} mean_b - T_a . log softmax(s_v / tau_s)``: the mean over pairs, as in
    the code, where the paper's equation 3 adds. ``ln K`` where predictions are uniform. It is SwAV's loss with other
    targets.

    Args:
        student: ``[M, B, K]`` scores of all crops, global ones first. targets: ``[|G|, B, K]`` of the global crops.
    """
    return swapped_prediction(student, targets, range(len(targets)), temperature=temperature)


@full_precision
@torch.no_grad()
def next_centre(centre: Tensor, scores: Tensor, *, momentum: float) -> Tensor:
    """``m c + (1 - m) mean t`` over the teacher's scores ``[..., K]``, those of all processes."""
    return torch.lerp(scores.flatten(0, -2).mean(0), centre, momentum)
