"""The numbers of SupCon's authors: HobbitLong/SupContrast, and the loss family of google-research/supcon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.losses.ntxent import ntxent
from selfsight.losses.supcon import by_image, supcon, supcon_per_anchor
from selfsight.methods.supcon import SupCon, unit
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

from .harness import Case, family

TOLERANCE = 1e-9


def temperatures(case: Case) -> dict[str, Any]:
    """T and T_base; cases of the TensorFlow family say whether the loss is multiplied by T."""
    T = case.number("temperature")
    if "scale_by_temperature" in case.hp:
        return {"temperature": T, "base_temperature": 1.0 if case.number("scale_by_temperature") else None}
    return {"temperature": T, "base_temperature": case.number("base_temperature")}


def options(case: Case) -> dict[str, Any]:
    chosen = temperatures(case)
    if "contrast_mode_all" in case.hp:
        chosen["contrast_mode"] = "all" if case.number("contrast_mode_all") else "one"
    if "denominator" in case.hp:
        chosen["summation"] = "in" if case.number("summation_inside") else "out"
        chosen["denominator"] = ("all", "one_positive", "only_negatives")[case.number("denominator")]
    return chosen


def pairs(case: Case, dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
    return {name: case.tensor(name, dtype) for name in ("labels", "mask") if name in case.inp}


def loss_and_gradient(case: Case, dtype: torch.dtype | None, tolerance: float) -> None:
    features = case.tensor("features", dtype, requires_grad=True)
    per_anchor = supcon_per_anchor(features, **pairs(case, dtype), **options(case))
    loss = supcon(features, **pairs(case, dtype), **options(case))
    loss.backward()
    assert loss.dtype == features.dtype
    case.compare("loss", loss, tolerance)
    case.compare("grad_features", features.grad, tolerance)
    case.compare("per_anchor", per_anchor, tolerance)


@family(
    "supcon", "labels_", "unsup_", "mask_", "singleton_", "all_singletons", "batch1", "one_class", "big_label", "v6",
    "temp_", "unnormalised", "rank5", "derived_",
)  # fmt: skip
def loss(case: Case) -> None:
    loss_and_gradient(case, torch.float64, TOLERANCE)


@family("supcon", "collapsed")
def collapsed(case: Case) -> None:
    loss_and_gradient(case, torch.float64, TOLERANCE)
    N, V = case.inp["features"].shape[:2]
    T = temperatures(case)
    method = build(Identity(1), **T).configure(OptimizationRecipe(torch.optim.SGD, 1.0), Clock(N, N, 1, 1))
    view = torch.ones(N, 1, dtype=torch.float64)
    method.training_step(Batch([view] * V, torch.arange(N), torch.zeros(N, dtype=torch.int64)), 0)
    case.compare("expected_closed_form", method.chance_loss(), TOLERANCE)


@family("supcon", "float32_labels")
def in_float32(case: Case) -> None:
    loss_and_gradient(case, None, 2e-5)


@family("supcon", "lowtemp_underflow")
def low_temperature(case: Case) -> None:
    """Values to 1e-4 of themselves in float32, where the authors' code gives NaN; to 1e-9 in float64."""
    assert case.tensor("features", None).dtype == torch.float32
    for dtype, tolerance in ((torch.float64, TOLERANCE), (None, 1e-4)):
        features = case.tensor("features", dtype, requires_grad=True)
        per_anchor = supcon_per_anchor(features, **pairs(case), **options(case))
        per_anchor.mean().backward()
        case.compare("loss", per_anchor.mean(), tolerance * min(1.0, float(case.out["loss"])))
        case.compare("per_anchor", per_anchor, tolerance)
        case.compare("grad_features", features.grad, tolerance)
    case.informative("official_float32_is_finite")


@family("supcon", "normalise_then_loss")
def normalised(case: Case) -> None:
    raw = case.tensor("raw", requires_grad=True)
    torch.testing.assert_close(unit(raw * 1e-20), raw * 1e-20 / case.number("normalize_eps"), rtol=1e-9, atol=0)
    value = supcon(unit(raw), **pairs(case), **options(case))
    value.backward()
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_raw", raw.grad, TOLERANCE)


@family("supcon", "ntxent_equivalence")
def simclr(case: Case) -> None:
    features = case.tensor("features", requires_grad=True)
    value = supcon(features, **options(case))
    value.backward()
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_features", features.grad, TOLERANCE)
    views, T = features.detach().unbind(1), case.number("temperature")
    for name, reduction in (("ntxent_mean_over_2n", "mean_2n"), ("simclr_tf_sum_of_two_halves", "sum_of_means")):
        case.compare(name, ntxent(*views, temperature=T, normalize=False, reduction=reduction), TOLERANCE)


@family("supcon", "two_halves_layout")
def two_halves(case: Case) -> None:
    features = by_image(case.tensor("model_output"), 2)
    case.compare("features", features, 0)
    case.compare("loss", supcon(features, **pairs(case), **options(case)), TOLERANCE)


@family("supcon", "tfunittest_")
def published_by_google(case: Case) -> None:
    per_sample = supcon_per_anchor(case.tensor("features"), **pairs(case), **options(case)).mean(0)
    case.compare("published_per_sample", per_sample, 1e-5)
    case.compare("per_sample", per_sample, TOLERANCE)


# --- method --------------------------------------------------------------------------------------------------------


class Identity(nn.Module):
    """Stands where cases begin at the head."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def build(backbone: nn.Module, **chosen: Any) -> SupCon:
    """The method with the authors' defaults in float64."""
    defaults: dict[str, Any] = {
        "supervised": True, "hidden_dim": None, "dim": 128, "last_bias": True, "init_std": None,
        "normalize_embedding": False, "temperature": 0.07, "base_temperature": 0.07, "contrast_mode": "all",
        "summation": "out", "denominator": "all", "positives_cap": None, "decay": "all",
    }  # fmt: skip
    return SupCon(backbone, **(defaults | chosen)).double()


@family("supcon", "sgd_")
def three_steps(case: Case) -> None:
    shapes = case.inp["0_weight"].shape, case.inp["2_weight"].shape
    method = build(Identity(shapes[0][1]), hidden_dim=shapes[0][0], dim=shapes[1][0], **temperatures(case))
    state = {name: case.tensor(name.replace(".", "_")) for name in method.projector.state_dict()}
    method.projector.load_state_dict(state)
    lr, momentum, decay = (case.number(name) for name in ("lr", "momentum", "weight_decay"))

    def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=decay)

    x, labels = case.tensor("x"), case.tensor("labels")
    method.configure(OptimizationRecipe(sgd, lr), Clock(1, 1, 1, len(x)))
    optimizer, losses = method.configure_optimizers(), []
    for step in range(len(x)):
        method.begin_step(step)
        optimizer.zero_grad()
        batch = Batch(list(x[step].chunk(2)), torch.arange(labels.shape[1]), labels[step])
        value = method.training_step(batch, step)["loss"]
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    case.compare("losses", torch.stack(losses), TOLERANCE)
    for name, tensor in method.projector.state_dict().items():
        case.compare(name.replace(".", "_"), tensor, TOLERANCE)


# --- network -------------------------------------------------------------------------------------------------------


def fill(module: nn.Module, seed: int) -> int:
    """The documented weight rule: tensor k of the state dict from ``RandomState(seed + k)``; how many there are."""
    k = 0
    for name, tensor in in_order(module):
        random = np.random.RandomState(seed + k)
        shape, k = tuple(tensor.shape), k + 1
        if tensor.ndim >= 2:
            value = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            value = 0.5 + random.random_sample(shape)
        elif name.endswith("weight"):
            value = 1 + 0.1 * random.standard_normal(shape)
        else:
            value = 0.1 * random.standard_normal(shape)
        tensor.data.copy_(torch.from_numpy(np.asarray(value)))
    return k


def in_order(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """State dict in the order of the layers, without counters."""
    return ((name, t) for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked"))


@family("supcon", "net_", slow=True)
def network(case: Case) -> None:
    name, *rest = case.name.removeprefix("net_").split("_")
    backbone = create(name, stem="cifar")
    method = build(backbone, hidden_dim=0 if "linear" in rest else None).eval()
    # The authors' weights are drawn in the order stem, stages, head: ours, without the unused parts.
    filled = fill(nn.ModuleList([backbone, method.projector]), case.number("weight_seed"))
    if "num_tensors" in case.hp:
        assert filled == case.number("num_tensors")
    x = case.tensor("x")
    maps: dict[str, Tensor] = {}
    for module, stage in {"act1": "stem", **{f"layer{i}": f"layer{i}" for i in range(1, 5)}}.items():
        keep = lambda _, __, output, stage=stage: maps.__setitem__(stage, output.detach().clone())  # noqa: E731
        backbone.get_submodule(module).register_forward_hook(keep)
    h = backbone(x)
    case.compare("projection", method.project(h), 1e-8)
    if "encoder_features" in case.out:
        case.compare("encoder_features", h, 1e-8)
        case.compare("map_sizes", [m.shape[-2:] for m in maps.values()], 0)
        for stage, m in maps.items():
            case.compare(f"{stage}_channel_mean", m.mean((2, 3)), 1e-8)
    if "projection_train_mode" in case.out:
        method.train()
        case.compare("projection_train_mode", method.project(backbone(x)), 1e-8)
        case.compare("stem_running_mean_after", backbone.bn1.running_mean, 1e-8)
        case.compare("stem_running_var_after", backbone.bn1.running_var, 1e-8)
