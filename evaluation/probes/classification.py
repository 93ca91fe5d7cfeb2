"""What a classifier gets right on held-out images, class by class, and how far its confidence can be believed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import MULTILABEL, Targets
from selfsight.errors import UserError
from selfsight.evaluation.features import Device, frozen, home
from selfsight.evaluation.probes.linear import top_accuracies
from selfsight.evaluation.probes.targets import target_figures

WATCHED = ("top1", "top5", "map", "f1", "r2")
BINS = 15  # of confidence, the usual number (Guo et al. 2017)


def predict(network: nn.Module, loader: Iterable[Any], device: Device = None) -> tuple[Tensor, Tensor]:
    """Class scores ``[N, K]`` float32 and labels ``[N]`` of the labelled images a loader yields, on the CPU.

    Args:
        network: images to scores; its training flags are as before when this returns.
        loader: yields `Batch` with one un-augmented view.

    Raises:
        UserError: no image has a label.
    """
    scores, labels, _ = _outputs(network, loader, device)
    known = None if labels is None else labels >= 0
    if labels is None or known is None or not bool(known.any()):
        raise UserError("No held-out image has a label: give class folders or a labels.csv for the test images.")
    return scores[known], labels[known]


def figures(network: nn.Module, loader: Iterable[Any], device: Device = None) -> dict[str, Any]:
    """All figures of a network on the images of a loader: `classification_figures`, or of targets `target_figures`."""
    scores, labels, targets = _outputs(network, loader, device)
    if targets is not None:
        return dict(target_figures(probabilities(scores, targets), targets))
    assert labels is not None, "who asks has seen that there are labels"
    known = labels >= 0
    return classification_figures(scores[known], labels[known])


def online_figures(network: nn.Module, loader: Iterable[Any], device: Device = None) -> dict[str, float]:
    """Those of `figures` by which a network is watched while it learns."""
    return {name: value for name, value in figures(network, loader, device).items() if name in WATCHED}


def probabilities(scores: Tensor, targets: Targets) -> Tensor:
    """Outputs of a network as `target_figures` takes them."""
    return scores.sigmoid() if targets.kind == MULTILABEL else scores


def _outputs(network: nn.Module, loader: Iterable[Any], device: Device) -> tuple[Tensor, Tensor | None, Targets | None]:
    """Outputs ``[N, K]`` float32, labels ``[N]`` and targets of all images, on the CPU."""
    device = home(network, device)
    scores, labels, targets = list[Tensor](), list[Tensor](), list[Targets]()
    with frozen(network):
        for batch in loader:
            scores.append(network(batch.views[0].to(device, non_blocking=True)).float().cpu())
            if batch.labels is not None:
                labels.append(batch.labels.cpu())
            if batch.targets is not None:
                targets.append(batch.targets.to("cpu"))
    known = torch.cat(labels) if labels else None
    return torch.cat(scores), known, Targets.joined(targets) if targets else None


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
