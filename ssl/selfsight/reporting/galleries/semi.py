"""Pseudo-labels of the semi-supervised methods."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from selfsight.contracts import Batch
from selfsight.methods.semi.base import SemiMethod
from selfsight.reporting.galleries.gallery import Gallery, galleries

NOTE = "Unlabelled images with the class the averaged network gives them, and how sure it is."


@galleries.register
def pseudo_labels(method: SemiMethod, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """Rows of eight images with the class they are given."""
    x = batch.views[0][:24]
    x = x[: len(x) // 8 * 8 or len(x)]
    p = method.logits(x, teacher=True).softmax(1)
    right = None
    if batch.labels is not None:
        y = batch.labels[: len(x)]
        right = ((p.argmax(1) == y) | (y < 0)).view(-1, min(8, len(x))).cpu()
    answers = [format_prediction(row, classes) for row in p]
    captions = [answers[i : i + 8] for i in range(0, len(answers), 8)]
    return [Gallery("Pseudo-labels", NOTE, x.unflatten(0, (-1, min(8, len(x)))), captions, right)]


def format_prediction(p: Tensor, classes: Sequence[str]) -> str:
    """``cat 87%``: the likeliest class of a distribution ``[C]``."""
    return f"{classes[int(p.argmax())]} {float(p.max()):.0%}"
