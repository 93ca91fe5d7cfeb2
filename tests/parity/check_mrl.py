"""The numbers of Matryoshka's authors (RAIVNLab/MRL); ``contrastive_`` and ``cascade_`` by the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from selfsight.evaluation.probes.funnel import funnel
from selfsight.losses.clip import pair_contrast
from selfsight.losses.matryoshka import matryoshka, over_prefixes
from selfsight.losses.ntxent import ntxent
from selfsight.nn.matryoshka import MatryoshkaLinear, cascade, nested_widths

from .harness import Case, family
from .networks import gradients

TOLERANCE = 1e-9


def head_of(case: Case) -> MatryoshkaLinear:
    classes, features = case.inp["weight_0"].shape[0], case.inp["x"].shape[1]
    options = {"efficient": bool(case.number("efficient")), "bias": bool(case.number("bias"))}
    head = MatryoshkaLinear(case.number("nesting"), classes, features=features, **options).double()
    names = {f"heads.{i}.{kind}": f"{kind}_{i}" for i in range(len(head.heads)) for kind in ("weight", "bias")}
    head.load_state_dict({ours: case.tensor(name) for ours, name in names.items() if name in case.inp})
    return head


@family("mrl", "head_")
def heads(case: Case) -> None:
    for i, logits in enumerate(head_of(case)(case.tensor("x"))):
        case.compare(f"logits_{i}", logits, TOLERANCE)


@family("mrl", "loss_")
def loss(case: Case) -> None:
    head, x = head_of(case), case.tensor("x", requires_grad=True)
    logits = head(x)
    importance, smoothing = case.number("relative_importance"), case.number("label_smoothing")
    value = matryoshka(logits, case.tensor("target"), importance=importance, label_smoothing=smoothing)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    for i, level in enumerate(logits):
        case.compare(f"logits_{i}", level, TOLERANCE)
    tensors = {"x": x} | {f"{kind}_{i}": p for i, h in enumerate(head.heads) for kind, p in h.named_parameters()}
    for name, gradient in gradients(tensors).items():
        case.compare(name, gradient, TOLERANCE)


@family("mrl", "fixed_")
def fixed(case: Case) -> None:
    head = MatryoshkaLinear([case.number("dim")], len(case.inp["bias"]), features=case.inp["x"].shape[1]).double()
    head.heads[0].load_state_dict({name: case.tensor(name) for name in ("weight", "bias")})
    case.compare("logits", head(case.tensor("x"))[0], TOLERANCE)


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
