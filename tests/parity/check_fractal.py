"""The numbers of fractal pre-training's authors (catalys1/fractal-pretraining)."""

from __future__ import annotations

from selfsight.datamodules.datasets import ifs
from selfsight.losses.multilabel import multi_hot, weighted_binary_cross_entropy

from .harness import Case, family
from .networks import gradients

TOLERANCE = 1e-9


@family("fractal", "singular_")
def singular_values(case: Case) -> None:
    values = ifs.singular_values(case.inp["u"], case.number("n"), case.number("alpha"))
    case.compare("singular_values", values, TOLERANCE)


@family("fractal", "system_")
def systems(case: Case) -> None:
    low, high = case.number("alpha_range")
    alpha = low + (high - low) * float(case.inp["alpha_u"])
    values = ifs.singular_values(case.inp["singular_u"], case.number("n"), alpha)
    signs = case.inp["sign_u"][..., 0]
    maps = ifs.system(signs, case.inp["angle_u"], values, case.inp["shift_u"], shift=case.number("shift"))
    case.compare("singular_values", values, TOLERANCE)
    case.compare("system", maps, TOLERANCE)


@family("fractal", "iterate_")
def walks(case: Case) -> None:
    maps, u = case.inp["system"], case.inp["u"]
    probabilities = case.hp["probabilities"] if "probabilities" in case.hp else ifs.map_probabilities(maps)
    case.compare("probabilities", probabilities, TOLERANCE)
    case.compare("points", ifs.chaos_game(maps, u, probabilities), TOLERANCE)
    side_by_side = ifs.chaos_game(maps, u[:, None].repeat(3, 1), probabilities).reshape(len(u), 3, 2)
    case.compare("points", side_by_side[:, 2], TOLERANCE)


@family("fractal", "render_")
def pixels(case: Case) -> None:
    stamp = case.inp.get("stamp")
    image = ifs.render(
        case.inp["points"], case.number("size"), case.inp["region"], stamp=stamp, binary=bool(case.number("binary"))
    )
    case.compare("image", image, 0 if case.number("binary") else TOLERANCE)


@family("fractal", "colour_")
def colours(case: Case) -> None:
    bounds = {name: case.number(name) for name in ("min_saturation", "min_value")}
    hsv = ifs.colour(case.inp["rendered"], case.inp["u"].tolist(), **bounds)
    case.compare("hsv", hsv, 0)
    case.compare("rgb", ifs.to_rgb(hsv).astype(float), 1.001 / max(1, case.out["rgb"].max()))


@family("fractal", "background_")
def backgrounds(case: Case) -> None:
    n, fixed = case.number("n"), bool(case.number("fixed_corners"))
    assert len(case.inp["u"]) == ifs.diamond_square_draws(n, fixed)
    height = ifs.diamond_square(case.inp["u"], n, decay=case.number("decay"), fixed_corners=fixed)
    hsv = ifs.background_colours(height, case.inp["colour_u"].tolist())
    case.compare("height", height, TOLERANCE)
    case.compare("hsv", hsv, 0)
    case.compare("rgb", ifs.to_rgb(hsv).astype(float), 1.001 / max(1, case.out["rgb"].max()))


@family("fractal", "composite_")
def composites(case: Case) -> None:
    both = (case.inp[name].astype("uint8") for name in ("foreground", "background"))
    case.compare("image", ifs.composite(*both), 0)


@family("fractal", "jitter_")
def jitters(case: Case) -> None:
    how = next(name for name in ifs.JITTERS if case.name.startswith(f"jitter_{name}"))
    case.compare("system", ifs.jittered(case.inp["system"], how, case.inp["u"]), TOLERANCE)


@family("fractal", "multilabel_")
def several_classes(case: Case) -> None:
    logits = case.tensor("logits", requires_grad=True)
    targets = multi_hot(case.tensor("labels"), logits.shape[1])
    loss = weighted_binary_cross_entropy(logits, targets)
    loss.backward()
    case.compare("targets", targets, 0)
    case.compare("loss", loss, TOLERANCE)
    case.compare("grad_logits", gradients({"logits": logits})["grad_logits"], TOLERANCE)
