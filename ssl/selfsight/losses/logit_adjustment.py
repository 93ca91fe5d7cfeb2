"""Logit adjustment for classes of unequal size.

    Menon, Jayasumana, Rawat, Jain, Veit, Kumar: Long-Tail Learning via Logit Adjustment. ICLR 2021, arXiv:2007.07314,
    equation 10: ``-log exp(f_y + tau log pi_y) / sum_c exp(f_c + tau log pi_c)``.

Training sees logits to which the classes' shares are added, so that the network itself answers as if all classes were
equally frequent; at test time nothing is added.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_shares(labels: Tensor, num_classes: int) -> Tensor:
    """``log pi`` ``[K]``: shares of the classes among ``labels`` (-1: none). A class without images has one."""
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes).clamp(min=1).double()
    return (counts / counts.sum()).log().float()


def adjusted(logits: Tensor, shares: Tensor, tau: float) -> Tensor:
    """``f + tau log pi`` for logits ``[B, K]`` and `log_shares`."""
    return logits + tau * shares.to(logits.dtype)
