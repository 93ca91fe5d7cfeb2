"""Probes of images that have several labels, or numbers, in place of one class; and the figures of what they say.

Figures are torchmetrics': mean average precision and F1 of labels, R² of numbers. What is not known (NaN) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional import r2_score
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from selfsight.contracts import MULTILABEL, Targets
from selfsight.evaluation.probes.logistic import fit_lbfgs

#: the figure by which a network is judged, by kind of targets
MAIN = {MULTILABEL: "map", "regression": "r2"}
UNKNOWN = -1

#: figures by name; those of each column inside another one
TargetFigures = dict[str, float | dict[str, float]]


def target_figures(said: Tensor, targets: Targets) -> TargetFigures:
    """How well ``said [N, T]`` fits: probabilities of labels, or numbers.

    Returns:
        ``map``, the mean over labels of their average precision, and ``f1``, the mean of their F1 where a label from
        0.5 on is said to be there; or ``r2``, the mean over columns of their R². Of several columns in ``map_of`` or
        ``r2_of`` that of each, where there is one: of a label that no image has, and a number known of fewer than two,
        there is none.
    """
    said = said.to(targets.values.device)
    found = _of_labels(said, targets) if targets.kind == MULTILABEL else {"r2": _r2_of_columns(said, targets.values)}
    name = MAIN[targets.kind]
    each = {
        column: float(value.clamp(max=1))
        for column, value in zip(targets.names, found.pop(name), strict=True)
        if bool(value.isfinite())
    }
    figures: TargetFigures = {name: sum(each.values()) / len(each)} if each else {}
    figures |= {key: float(value) for key, value in found.items()}
    return figures | ({f"{name}_of": each} if len(targets.names) > 1 else {})


def _of_labels(said: Tensor, targets: Targets) -> dict[str, Tensor]:
    count = len(targets.names)
    truth = targets.values.nan_to_num(UNKNOWN).long()
    there = (truth == 1).any(dim=0)
    precision = said.new_full((count,), torch.nan)
    if bool(there.any()):
        some = int(there.sum())
        precision[there] = _at_least_two(multilabel_average_precision, said[:, there], truth[:, there], some)
    f1 = _at_least_two(multilabel_f1_score, said, truth, count)
    return {"map": precision, "f1": f1[there].mean() if bool(there.any()) else f1.mean()}


def _at_least_two(metric: object, said: Tensor, truth: Tensor, labels: int) -> Tensor:
    """A figure of each label; torchmetrics takes two or more of them."""
    if labels == 1:
        said, truth = said.repeat(1, 2), truth.repeat(1, 2)
    each: Tensor = metric(said, truth, max(2, labels), average="none", ignore_index=UNKNOWN)  # type: ignore[operator]
    return each[:labels]


def _r2_of_columns(said: Tensor, values: Tensor) -> Tensor:
    """``[T]``, NaN where fewer than two values are known."""
    each = []
    for column, truth in zip(said.T, values.T, strict=True):
        known = ~truth.isnan()
        enough = int(known.sum()) > 1
        each.append(r2_score(column[known].double(), truth[known].double()) if enough else said.new_tensor(torch.nan))
    return torch.stack([value.double() for value in each])


def votes(weight: Tensor, values: Tensor) -> Tensor:
    """The weighted mean ``[M, T]`` of the targets of neighbours, over those that are known; 0 where none is.

    Args:
        weight: ``[M, k]``. values: ``[M, k, T]``.
    """
    known = ~values.isnan()
    parts = weight[:, :, None] * known
    return (parts * values.nan_to_num()).sum(dim=1) / parts.sum(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)


# --- linear ----------------------------------------------------------------------------------------------------------


def linear_outputs(x: Tensor, targets: Targets, penalties: Sequence[float], others: Tensor) -> Tensor:
    """What linear models fitted on ``x [N, D]`` say of ``others [M, D]``, for every penalty: ``[H, M, T]``.

    Of labels the probabilities by a logistic regression each; of numbers ridge regressions, on numbers of mean 0 and
    variance 1, which gives the penalties one meaning.
    """
    if targets.kind == MULTILABEL:
        columns = [_logistic(x, column, penalties, others) for column in targets.values.T]
    else:
        columns = [_ridge(x, column, penalties, others) for column in targets.values.T]
    return torch.stack(columns, dim=2)


def _logistic(x: Tensor, truth: Tensor, penalties: Sequence[float], others: Tensor) -> Tensor:
    """``[H, M]`` probabilities of one label."""
    known = ~truth.isnan()
    if not bool(known.any()):
        return others.new_full((len(penalties), len(others)), 0.5)
    scores = fit_lbfgs(x[known], truth[known].long(), 2, penalties)(others)  # [M, H, 2]
    return scores.softmax(dim=2)[:, :, 1].T


def _ridge(x: Tensor, truth: Tensor, penalties: Sequence[float], others: Tensor) -> Tensor:
    """``[H, M]`` values of one column: least squares  1/2 mean (y - x w - b)^2 + lambda / 2 |w|^2, the bias free."""
    known = ~truth.isnan()
    if not bool(known.any()):
        return others.new_zeros(len(penalties), len(others))
    x, truth = x[known].double(), truth[known].double()
    centre, mean, spread = x.mean(dim=0), truth.mean(), truth.std(correction=0)
    spread = spread.where(spread > 0, torch.ones_like(spread))
    inside, y = x - centre, (truth - mean) / spread
    ev, q = torch.linalg.eigh(inside.T @ inside / len(x))
    slope = q.T @ (inside.T @ y / len(x))
    shrunk = slope / (ev.clamp(min=0) + torch.tensor(list(penalties), device=x.device)[:, None]).clamp(min=1e-12)
    said: Tensor = ((others.double() - centre) @ q) @ shrunk.T  # [M, H]
    return (said * spread + mean).T.to(others.dtype)


def misfit(said: Tensor, targets: Targets) -> Tensor:
    """``[H]``: cross-entropy of labels, or squared error relative to the variance of each column, over what is known.

    Args:
        said: ``[H, M, T]``.
    """
    values = targets.values
    known = ~values.isnan()
    truth = values.nan_to_num()
    if targets.kind == MULTILABEL:
        p = said.double().clamp(1e-12, 1 - 1e-12)
        each = -(truth * p.log() + (1 - truth) * (1 - p).log())
    else:
        spread = torch.stack([column[~column.isnan()].var(correction=0) for column in values.T]).nan_to_num()
        each = (said.double() - truth).square() / spread.clamp(min=1e-12)
    return (each * known).sum(dim=(1, 2)) / known.sum().clamp(min=1)
