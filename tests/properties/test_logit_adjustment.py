"""Logit adjustment: the loss of the paper's equation, and what it does to a rare class."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.logit_adjustment import adjusted, log_shares
from selfsight.methods.finetune import FineTune
from selfsight.methods.supce import SupCE
from tests.small import SmallNet


def test_the_equation() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [-1] * 5)
    shares = log_shares(labels, 3)
    torch.testing.assert_close(shares, torch.tensor([6 / 9, 2 / 9, 1 / 9]).log())  # a class without images: as of one
    logits, y, tau = torch.tensor([[0.2, -1.0, 0.5]]), torch.tensor([1]), 1.5
    weights = [math.exp(f) * pi**tau for f, pi in zip(logits[0].tolist(), (6 / 9, 2 / 9, 1 / 9), strict=True)]
    expected = -math.log(weights[1] / sum(weights))
    assert float(F.cross_entropy(adjusted(logits, shares, tau), y)) == pytest.approx(expected, rel=1e-6)


def test_even_classes_change_nothing() -> None:
    logits, y = torch.randn(8, 4), torch.arange(8) % 4
    even = adjusted(logits, log_shares(torch.arange(40) % 4, 4), 1.0)
    torch.testing.assert_close(F.cross_entropy(even, y), F.cross_entropy(logits, y))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FineTune, SupCE])
def test_a_constant_network_is_not_drawn_to_the_frequent_class(kind: type[FineTune] | type[SupCE]) -> None:
    """Without features to go by, the best logits are the shares; with adjustment they are equal."""
    labels = torch.tensor([0] * 9 + [1])
    batch = Batch([torch.zeros(10, 3, 8, 8)], torch.arange(10), labels)
    ends = []
    for tau in (0.0, 1.0):
        torch.manual_seed(0)
        net = SmallNet().requires_grad_(False).eval()
        method = kind(net, num_classes=2, logit_adjustment=tau, labels=labels)
        optimizer = torch.optim.SGD(method.classifier.parameters(), lr=1.0)
        for _ in range(400):
            optimizer.zero_grad()
            method.training_step(batch, 0)["loss"].backward()
            optimizer.step()
        logits = method.classifier(net(batch.views[0][:1]))[0]
        ends.append(float((logits[0] - logits[1]).detach()))
        assert "log_shares" not in method.state_dict()
    assert ends[0] == pytest.approx(math.log(9), abs=0.05)
    assert ends[1] == pytest.approx(0, abs=0.05)


def test_questions_one_by_one_have_no_shares() -> None:
    with pytest.raises(UserError, match=r"method.logit_adjustment .* method.binary=true"):
        FineTune(SmallNet(), num_classes=2, binary=True, logit_adjustment=1.0)
