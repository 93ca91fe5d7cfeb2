"""`heads=matryoshka`: a method learns from the first features as it would if there were no others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.losses.matryoshka import matryoshka
from selfsight.methods.base import Method
from selfsight.methods.matryoshka import Matryoshka
from selfsight.methods.semi.base import Heads
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.supce import SupCE

from ..every_method import batch_of, every_method, make
from ..small import SmallNet

#: methods without a head on pooled features
OTHERS = {"Distillation", "FeatureDistillation", "FineTune", "MAE", "PixPro", "SparK"}
ON_FEATURES = [kind for kind in every_method() if kind.__name__ not in OTHERS]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def begun(kind: type[Method], **changes: Any) -> tuple[Method, Any]:
    """A method with a step behind it, so that queues, banks and clusters are not empty, and the next batch."""
    if "norm_feat" in kind.__init__.__annotations__:  # zeros in place of the other features have no norm's statistics
        changes["norm_feat"] = False
    method, size = make(kind, **changes)
    method = method.double()
    method.begin_step(0)
    method.training_step(batch_of(method, size, 0), 0)
    method.end_step()
    method.zero_grad()
    return method, batch_of(method, size, 1)


def of_the_first(method: Method, m: int) -> Method:
    """A copy whose networks give zeros for all but the first m features."""
    cut, kind = copy.deepcopy(method), type(method.backbone)
    for network in cut.modules():
        if type(network) is kind and hasattr(network, "num_features"):
            network.register_forward_hook(lambda _, __, x: torch.where(torch.arange(x.shape[-1]) < m, x, 0.0))
    return cut


def gradients(method: Method, batch: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    method.begin_step(1)
    loss = method.training_step(batch, 1)["loss"]
    loss.backward()
    draw = {"draw": torch.rand(1)}  # what the next one who asks is given
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None} | {"loss": loss.detach()} | draw


@pytest.mark.parametrize("kind", ON_FEATURES, ids=lambda kind: kind.__name__)
def test_the_loss_of_every_method_is_the_sum_over_slices(kind: type[Method]) -> None:
    """So are its gradients, and what goes into queues, banks and means is that of all features, once."""
    method, batch = begun(kind)
    width: int = method.backbone.num_features  # type: ignore[assignment]
    dims, weights = [width // 3, width // 2, width], (2.0, 0.5, 1.0)
    slices = [of_the_first(method, m) for m in dims]
    nested = Matryoshka(dims=dims[:-1], efficient=True, importance=weights).on(method)
    found = gradients(nested, batch)
    parts = [gradients(one, batch) for one in slices]
    for name, value in found.items():
        if name == "draw":
            expected = parts[-1][name]
        else:
            expected = sum(c * part[name] for c, part in zip(weights, parts, strict=True) if name in part)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=lambda t, n=name: f"{n}: {t}")
    nested.end_step()
    slices[-1].end_step()
    state = slices[-1].state_dict()
    for name, value in nested.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=lambda t, n=name: f"{n}: {t}")


def test_with_weights_of_their_own_each_prefix_has_a_classifier() -> None:
    method, batch = begun(SupCE)
    nested = Matryoshka(dims=[2, 4]).on(method)
    heads = [*method.classifier.prefixes.children(), method.classifier]
    assert [head.in_features for head in heads] == [2, 4, method.backbone.num_features]
    h = torch.cat([method.backbone(view) for view in batch.views])
    logits = [head(h[:, : head.in_features]) for head in heads]
    found = nested.training_step(batch, 1)
    torch.testing.assert_close(found["loss"], matryoshka(logits, batch.labels.repeat(len(batch.views))))
    found["loss"].backward()
    assert all(head.weight.grad.abs().max() > 0 for head in heads)
    copied = copy.deepcopy(nested)
    for p in copied.classifier.parameters():
        p.data.zero_()
    assert copied.training_step(batch, 1)["loss"] != nested.training_step(batch, 1)["loss"], "a copy learns by its own"


def test_a_norm_before_the_heads_is_of_the_prefix_alone() -> None:
    heads, f = Heads(8, 3, 4, norm_feat=True), torch.randn(5, 8)
    torch.nn.init.normal_(heads.norm.weight)
    h = torch.nn.functional.layer_norm(f[:, :6], (6,)) * heads.norm.weight[:6] + heads.norm.bias[:6]
    torch.testing.assert_close(heads(f[:, :6])[0], h @ heads.fc.weight[:, :6].T + heads.fc.bias)
    torch.testing.assert_close(heads(f)[0], heads.fc(torch.nn.LayerNorm.forward(heads.norm, f)))


@pytest.mark.parametrize("kind", [k for k in every_method() if k.__name__ in OTHERS], ids=lambda kind: kind.__name__)
def test_methods_without_a_head_on_features_are_refused(kind: type[Method]) -> None:
    with pytest.raises(UserError, match=f"^heads=matryoshka cuts the pooled features .* and {kind.__name__} has no"):
        Matryoshka().on(make(kind)[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dims": [4, 9]}, r"of embeddings of 8 numbers; give different whole numbers from 1 to 8"),
        ({"dims": [4, 2]}, r"are \[4, 2\]; different numbers that ascend were expected: \[2, 4\]"),
        ({"dims": [2, 4], "importance": [1, 2]}, "2 weights were given for 3 nested dimensions"),
        ({}, "has nothing to cut: the features are 8 numbers"),
        ({"dims": "all"}, "dims of Matryoshka is .all.; null or a whole number of at least 1 was expected"),
    ],
)
def test_dimensions_that_cannot_be_meant(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Matryoshka(**options).on(SimCLRv2(SmallNet()))
