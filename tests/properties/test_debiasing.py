"""Debiased pseudo-labels: the formulas by hand, in every method that has them, and what they bring."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError
from selfsight.methods import AdaMatch, FixMatch, FlexMatch, FreeMatch, SoftMatch
from selfsight.methods.semi.debiasing import Debiasing

from ..semi_supervised import CLASSES, LABELS, UNLABELLED, Net, batch, make

KINDS = {
    FixMatch: {"tau": 0.0},
    FlexMatch: {"num_unlabelled": UNLABELLED},
    FreeMatch: {"m": 1.0},
    SoftMatch: {},
    AdaMatch: {"tau": 0.0},
}


def by_hand(logits: list[list[float]]) -> list[float]:
    """The mean softmax of some rows."""
    rows = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_the_formulas_by_hand() -> None:
    debiasing = Debiasing(3, strength=0.5, momentum=0.9)
    p = [1 / 3] * 3
    for step in range(3):
        batches = [[[2.0, 0.5 * step, -1.0], [1.0, 1.0, 0.0]], [[0.3, -0.2, 4.0]]]  # two to a step
        means: list[list[float]] = []
        for weak in batches:
            means.append(by_hand(weak))
            taken = [0.9 * old + 0.1 * sum(m[c] for m in means) / len(means) for c, old in enumerate(p)]
            guessing, learning = debiasing(torch.tensor(weak), torch.ones(2, 3))
            wanted = torch.tensor([[v - 0.5 * math.log(q) for v, q in zip(row, p, strict=True)] for row in weak])
            torch.testing.assert_close(guessing, wanted)
            torch.testing.assert_close(learning[0], torch.tensor([1 + 0.5 * math.log(q) for q in taken]))
        torch.testing.assert_close(debiasing.p, torch.tensor(p))  # moves once a step, after it
        debiasing.commit()
        p = taken
    torch.testing.assert_close(debiasing.p, torch.tensor(p))


def test_a_class_that_is_never_named_leaves_numbers() -> None:
    debiasing = Debiasing(2, strength=0.5, momentum=0.0)
    for _ in range(2):
        found = debiasing(torch.tensor([[500.0, -500.0]]), torch.tensor([[500.0, -500.0]]))
        assert all(bool(each.isfinite().all()) for each in found)
        debiasing.commit()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_method_of_the_family_learns_by_them(kind: type) -> None:
    """The unlabelled loss is of the guesses and margins that the formulas give; without the option it is as it was."""

    def step(debias: float) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        method = kind(Net(), labels=LABELS, num_classes=CLASSES, debias=debias, debias_m=0.5, **KINDS[kind])
        with torch.no_grad():
            method.heads.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))  # which names the first class, whatever it sees
            found = method.training_step(batch(0, "fixmatch"), 0)
            (_,), (weak,), (strong,) = method.student_forward(*method.views(batch(0, "fixmatch")))
        for part in method.states():
            part.commit()
        return {**found, "weak": weak, "strong": strong}, method.state_dict().get("debiasing.p")

    plain, nothing = step(0.0)
    found, p = step(1.0)
    assert nothing is None
    torch.testing.assert_close(p, 0.5 / CLASSES + 0.5 * found["weak"].softmax(-1).mean(0))
    assert float(p[0]) == float(p.max())
    guess = (found["weak"] - math.log(1 / CLASSES)).argmax(-1)
    per_image = F.cross_entropy(found["strong"] + p.log(), guess, reduction="none")
    if kind in (FixMatch, FlexMatch, FreeMatch):  # the others weigh or align guesses
        assert float(found["mask_rate"]) == 1
        assert float(found["loss_unsup"]) == pytest.approx(float(per_image.mean()), rel=1e-5)
    assert abs(float(found["loss_unsup"]) - float(plain["loss_unsup"])) > 1e-3
    assert float(found["loss_sup"]) == pytest.approx(float(plain["loss_sup"]))


def test_classes_of_unequal_size_are_named_more_evenly() -> None:
    """A network drawn to one class comes to name the others, which it never does by its own guesses."""

    def shares(debias: float) -> Tensor:
        method = make("fixmatch", tau=0.4, da_m=None, debias=debias, debias_m=0.9)
        with torch.no_grad():
            method.heads.bias[0] += 1.5
        optimizer = method.configure_optimizers()
        for step in range(25):
            method.begin_step(step)
            optimizer.zero_grad()
            method.training_step(batch(step, "fixmatch", unlabelled=32), step)["loss"].backward()
            optimizer.step()
            method.end_step()
        (_,), (weak,), _ = method.student_forward(*method.views(batch(99, "fixmatch", unlabelled=64)))
        return torch.bincount(weak.argmax(-1), minlength=CLASSES) / len(weak)

    assert float(shares(1.0).max()) < float(shares(0.0).max())


def test_values_that_cannot_be_meant() -> None:
    with pytest.raises(UserError, match="debias of FixMatch is -1"):
        FixMatch(Net(), labels=LABELS, num_classes=CLASSES, debias=-1)
