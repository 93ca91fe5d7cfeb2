"""Pseudo-labels, and what label propagation makes of them in SimMatchV2."""

from __future__ import annotations

from collections.abc import Sequence

from selfsight.contracts import Batch
from selfsight.losses import simmatchv2 as loss
from selfsight.methods.semi.simmatchv2 import SimMatchV2
from selfsight.reporting.galleries.gallery import Gallery, galleries
from selfsight.reporting.galleries.semi import format_prediction, pseudo_labels

NOTE = (
    "The images whose label propagation changes most: label before and after, then the labelled images "
    "nearest to each, with the weight of their label."
)


@galleries.register
def propagation(method: SimMatchV2, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """Pseudo-labels, and those that propagation changes most, with the labelled images that change them."""
    logits, z = method.teacher(batch.views[0])
    q = logits.softmax(-1)
    p = q if method.da_m is None else loss.align(q, method.da)  # [B, C]
    r = loss.refine(z, p, method.l_bank, method.l_labels, n=method.n, t=method.t, alpha=method.alpha)  # [B, C]
    changed = (r - p).abs().sum(1).topk(min(8, len(p))).indices
    nearest, weights = loss.neighbourhood(z[changed], method.l_bank, n=method.n, t=method.t, alpha=method.alpha)
    heaviest = weights[:, 1:].topk(min(6, method.n)).indices  # [8, 6]
    captions = []
    for i, (rows, shares) in enumerate(zip(nearest, weights, strict=True)):
        of_itself = f"{format_prediction(p[changed[i]], classes)} → {format_prediction(r[changed[i]], classes)}"
        others = [f"{classes[int(method.l_labels[rows[j]])]} {float(shares[1 + j]):.1%}" for j in heaviest[i]]
        captions.append([of_itself, *others])
    x = batch.views[0][changed][:, None]
    found = Gallery("Propagation", NOTE, x, captions, labelled=nearest.gather(1, heaviest))
    return [*pseudo_labels(method, batch, classes), found]
