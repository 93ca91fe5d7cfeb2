"""Images turned four ways, and the turn that rotation prediction sees."""

from __future__ import annotations

from collections.abc import Sequence

from selfsight.contracts import Batch
from selfsight.methods.rotation import Rotation
from selfsight.nn.rotate import rotate4
from selfsight.reporting.galleries.gallery import Gallery, galleries

NOTE = "Each image turned by 0, 90, 180 and 270 degrees, and the turn the network sees."


@galleries.register
def turns(method: Rotation, batch: Batch, classes: Sequence[str]) -> list[Gallery]:
    """A row of four for each image."""
    x, y = rotate4(batch.views[0][:6])
    p = method.logits(x).softmax(1)
    answers = [f"{90 * int(row.argmax())}° {row.max():.0%}" for row in p]
    right = (p.argmax(1) == y).view(-1, 4).cpu()
    captions = [answers[i : i + 4] for i in range(0, len(answers), 4)]
    return [Gallery("Which way up", NOTE, x.unflatten(0, (-1, 4)), captions, right)]
