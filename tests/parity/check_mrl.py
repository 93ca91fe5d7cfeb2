"""The numbers of Matryoshka's authors (RAIVNLab/MRL); ``contrastive_`` and ``cascade_`` by the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from selfsight.evaluation.probes.funnel import funnel
from selfsight.losses.clip import pair_contrast
from selfsight.losses.matryoshka import matryoshka, over_prefixes
from selfsight.losses.ntxent import ntxent
from selfsight.nn.matryoshka import PrefixLinear, cascade, nested_widths, prefixes

from .harness import Case, family
from .networks import gradients

TOLERANCE = 1e-9


def head_of(case: Case) -> PrefixLinear:
    """A layer whose whole width is the largest prefix: features beyond it are not used."""
    widths, efficient = case.number("nesting"), bool(case.number("efficient"))
    head = PrefixLinear(max(widths), case.inp["weight_0"].shape[0], bias=bool(case.number("bias"))).double()
    if not efficient:
        head.own_weights(widths)
    for i, layer in enumerate(layers(head)):
        for kind, p in layer.named_parameters(recurse=False):
            p.data.copy_(case.tensor(f"{kind}_{i}"))
    return head


def layers(head: PrefixLinear) -> list[nn.Module]:
    """Those with weights of their own, the one of the shortest prefix first."""
    return [*head.prefixes.children(), head]


def scores(head: PrefixLinear, x: Tensor, case: Case) -> list[Tensor]:
    return [head(part) for part in prefixes(x, case.number("nesting"))]


@family("mrl", "head_")
def heads(case: Case) -> None:
    for i, logits in enumerate(scores(head_of(case), case.tensor("x"), case)):
        case.compare(f"logits_{i}", logits, TOLERANCE)


@family("mrl", "loss_")
def loss(case: Case) -> None:
    head, x = head_of(case), case.tensor("x", requires_grad=True)
    logits = scores(head, x, case)
    importance, smoothing = case.number("relative_importance"), case.number("label_smoothing")
    value = matryoshka(logits, case.tensor("target"), importance=importance, label_smoothing=smoothing)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    for i, level in enumerate(logits):
        case.compare(f"logits_{i}", level, TOLERANCE)
    own = {f"{kind}_{i}": p for i, h in enumerate(layers(head)) for kind, p in h.named_parameters(recurse=False)}
    tensors = {"x": x} | own
    for name, gradient in gradients(tensors).items():
        case.compare(name, gradient, TOLERANCE)


@family("mrl", "fixed_")
def fixed(case: Case) -> None:
    x, m = case.tensor("x"), case.number("dim")
    head = PrefixLinear(x.shape[1], len(case.inp["bias"])).double()
    head.own_weights([m])
    (layer, *_) = layers(head)  # the whole one, where m is the width
    layer.load_state_dict({name: case.tensor(name) for name in ("weight", "bias")})
    case.compare("logits", head(x[:, :m]), TOLERANCE)


@family("mrl", "nesting_")
def nesting(case: Case) -> None:
    case.compare("nesting", nested_widths(case.number("start"), 11), 0)


def summed(case: Case, contrast: Callable[..., Tensor], *names: str) -> None:
    z = {name: case.tensor(name, requires_grad=True) for name in names}
    importance = case.number("relative_importance") if "relative_importance" in case.hp else None
    value, losses = over_prefixes(contrast, case.number("nesting"), *z.values(), importance=importance)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    case.compare("losses", losses, TOLERANCE)
    for name, gradient in gradients(z).items():
        case.compare(name, gradient, TOLERANCE)


@family("mrl", "contrastive_simclr")
def nested_simclr(case: Case) -> None:
    summed(case, partial(ntxent, temperature=case.number("temperature"), reduction="mean_2n"), "z1", "z2")


@family("mrl", "contrastive_pair")
def nested_pairs(case: Case) -> None:
    summed(case, partial(pair_contrast, scale=case.number("logit_scale")), "image", "text")


@family("mrl", "retrieval_")
def retrieval(case: Case) -> None:
    found, ranked = funnel(
        case.tensor("queries"), case.tensor("database"), first=case.number("retrieval_dim"),
        dims=case.number("rerank_dims"), shortlists=case.number("shortlists"),
    )  # fmt: skip
    case.compare("neighbours", found, 0)
    case.compare("reranked", ranked, 0)


@family("mrl", "cascade_")
def cascades(case: Case) -> None:
    level, label = cascade(case.tensor("logits"), case.inp["thresholds"].tolist())
    case.compare("level", level, 0)
    case.compare("prediction", label, 0)
