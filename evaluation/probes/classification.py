"""What a classifier gets right on held-out images, class by class, and how far its confidence can be believed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.evaluation.features import Device, frozen, home
from selfsight.evaluation.probes.linear import top_accuracies

BINS = 15  # of confidence, the usual number (Guo et al. 2017)


def predict(network: nn.Module, loader: Iterable[Any], device: Device = None) -> tuple[Tensor, Tensor]:
    """Class scores ``[N, K]`` float32 and labels ``[N]`` of the labelled images a loader yields, on the CPU.

    Args:
        network: images to scores; its training flags are as before when this returns.
        loader: yields `Batch` with one un-augmented view.

    Raises:
        UserError: no image has a label.
    """
    device = home(network, device)
    scores, labels = [], []
    with frozen(network):
        for batch in loader:
            if batch.labels is not None:
                scores.append(network(batch.views[0].to(device, non_blocking=True)).float().cpu())
                labels.append(batch.labels.cpu())
    known = torch.cat(labels) >= 0 if labels else torch.zeros(0, dtype=torch.bool)
    if not bool(known.any()):
        raise UserError("No held-out image has a label: give class folders or a labels.csv for the test images.")
    return torch.cat(scores)[known], torch.cat(labels)[known]


def classification_figures(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Figures of class scores ``[N, K]`` against labels ``[N]``.

    Returns:
        ``top1``, ``top5`` (with more than five classes), ``nll`` (mean negative log-likelihood), ``ece``,
        ``per_class`` (accuracy of each class, None for one without images), ``confusion`` (``[K][K]`` counts, row =
        true class, column = answer).
    """
    K = scores.shape[1]
    p = scores.double().softmax(1)
    answers = scores.argmax(1)
    confusion = torch.bincount(labels * K + answers, minlength=K * K).reshape(K, K)
    sizes = confusion.sum(1)
    right = confusion.diagonal()
    return {
        **top_accuracies(scores, labels),
        "nll": float(-p.gather(1, labels[:, None]).clamp(min=1e-300).log().mean()),
        "ece": expected_calibration_error(p.amax(1), answers == labels),
        "per_class": [float(r / n) if n else None for r, n in zip(right.tolist(), sizes.tolist(), strict=True)],
        "confusion": confusion.tolist(),
    }


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """``sum_b n_b / N |accuracy_b - confidence_b|`` over bins of equal width (Guo et al. 2017, equation 3).

    Args:
        confidence: ``[N]`` in 0 .. 1, probability of the answer. right: ``[N]`` bool.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # a bin holds its upper edge
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return float(gap.abs().sum() / len(right))
