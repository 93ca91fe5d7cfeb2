"""What LARS, LARC, LAMB, parameter groups and schedules promise beyond the recorded trajectories."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selfsight.errors import UserError
from selfsight.optim import LAMB, LARC, LARS, OptimizationRecipe, layer_decayed, split_no_decay
from selfsight.optim.groups import all_parameters
from selfsight.optim.sam import SAM
from selfsight.optim.schedule import Clock, Constant, Cosine, Milestones, Schedule, Table, Warmup

Make = Callable[..., torch.optim.Optimizer]
LARS_VARIANTS: dict[str, Make] = {
    variant: partial(LARS, lr=0.5, momentum=0.9, variant=variant) for variant in ("classic", "torch", "popular")
}
LAYERWISE: dict[str, Make] = {
    **LARS_VARIANTS,
    "nesterov": partial(LARS, lr=0.5, momentum=0.9, nesterov=True),
    "larc": partial(LARC, lr=0.5, momentum=0.9, eps=0.0),
}
EVERY: dict[str, Make] = {**LAYERWISE, "lamb": partial(LAMB, lr=0.5, betas=(0.9, 0.99), max_grad_norm=1.0)}


def over(makers: dict[str, Make]) -> Any:
    return pytest.mark.parametrize("make", makers.values(), ids=makers.keys())


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (2, 3, 2, 2), (5,))]


def parameters(scale: float = 1.0) -> list[nn.Parameter]:
    return [nn.Parameter(scale * t) for t in tensors(0)]


def walk(optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> list[Tensor]:
    """Parameters after ``steps`` with the same gradients whoever walks."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, g in zip(weights, tensors(100 + step), strict=True):
            p.grad = scale * g
        optimizer.step()
    return [p.detach().clone() for p in weights]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@over(LAYERWISE)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_size_of_the_gradient_does_not_matter(make: Make, scale: float) -> None:
    expected = walk(make(parameters(), weight_decay=0.0), range(4))
    assert_same(walk(make(parameters(), weight_decay=0.0), range(4), scale=scale), expected)


@over(EVERY)
def test_larger_weights_take_larger_steps(make: Make) -> None:
    once = walk(make(parameters(), weight_decay=0.0), range(1))
    thrice = walk(make(parameters(3.0), weight_decay=0.0), range(1))
    assert_same(thrice, [3 * p for p in once])


@over(LAYERWISE)
def test_without_decay_the_step_is_still_adapted(make: Make) -> None:
    before = parameters()
    after = walk(make(parameters(), weight_decay=0.0), range(1))
    nesterov = make is LAYERWISE["nesterov"]
    for p, q in zip(before, after, strict=True):
        expected = 0.5 * 0.001 * p.norm() * (1.9 if nesterov else 1.0)
        torch.testing.assert_close((p - q).norm(), expected, rtol=1e-9, atol=0)


@over(LAYERWISE)
def test_plain_groups_take_sgd_steps_whatever_their_decay(make: Make) -> None:
    got = walk(make([{"params": parameters(), "plain": True, "weight_decay": 0.3}], weight_decay=0.3), range(4))
    nesterov = make is LAYERWISE["nesterov"]
    assert_same(got, walk(torch.optim.SGD(parameters(), lr=0.5, momentum=0.9, nesterov=nesterov), range(4)))


def test_plain_groups_of_lamb_take_adam_steps() -> None:
    make = partial(LAMB, lr=0.5, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.3, max_grad_norm=None)
    adam = torch.optim.Adam(parameters(), lr=0.5, betas=(0.9, 0.99), eps=1e-6)
    assert_same(walk(make([{"params": parameters(), "plain": True}]), range(4)), walk(adam, range(4)))


@over(LAYERWISE)
def test_zero_weights_take_the_raw_step(make: Make) -> None:
    zeros = [nn.Parameter(torch.zeros_like(t)) for t in tensors(0)]
    nesterov = make is LAYERWISE["nesterov"]
    sgd = torch.optim.SGD([nn.Parameter(p.clone()) for p in zeros], lr=0.5, momentum=0.9, nesterov=nesterov)
    assert_same(walk(make(zeros, weight_decay=0.1), range(1)), walk(sgd, range(1)))


def test_zero_gradients() -> None:
    weights = [p.detach() for p in parameters()]
    for make in (*LARS_VARIANTS.values(), EVERY["lamb"], EVERY["larc"]):
        assert_same(walk(make(parameters(), weight_decay=0.0), range(1), scale=0.0), weights)
    # LARS decays a tensor without gradient by a step of trust size, LARC leaves it alone
    shrunk = walk(LARS(parameters(), lr=0.5, momentum=0.0, weight_decay=0.1), range(1), scale=0.0)
    assert_same(shrunk, [(1 - 0.5 * 0.001) * w for w in weights])
    assert_same(walk(EVERY["larc"](parameters(), weight_decay=0.1), range(1), scale=0.0), weights)


def test_lamb_clips_all_gradients_together() -> None:
    """Beyond the bound only the direction counts, and the norm reported is the one before."""
    make = partial(LAMB, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, max_grad_norm=1e-3, eps=1.0)
    small, large = make(parameters()), make(parameters())
    assert_same(walk(small, range(3)), walk(large, range(3), scale=50.0))
    expected = math.sqrt(sum(float(g.square().sum()) for g in tensors(102)))
    assert float(small.gradient_norm) == pytest.approx(expected)
    assert float(large.gradient_norm) == pytest.approx(50 * expected)


@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("grad_averaging", [False, True])
def test_options_of_lamb_step_by_step(grad_averaging: bool, trust_clip: bool) -> None:
    """The formula of the docstring, a tensor at a time; ratios lie on both sides of 1."""
    beta1, beta2, lr, decay = 0.9, 0.99, 0.01, 0.1
    weights = [p.detach().clone() * scale for p, scale in zip(parameters(), (0.01, 1.0, 100.0), strict=False)]
    params = [nn.Parameter(w.clone()) for w in weights]
    lamb = LAMB(
        params, lr, betas=(beta1, beta2), weight_decay=decay, max_grad_norm=None,
        grad_averaging=grad_averaging, trust_clip=trust_clip,
    )  # fmt: skip
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    ratios = []
    for t in range(1, 4):
        for i, (p, w, g) in enumerate(zip(params, weights, tensors(100 + t), strict=False)):
            p.grad = g.clone()
            m[i] = beta1 * m[i] + (1 - beta1 if grad_averaging else 1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            u = m[i] / (1 - beta1**t) / ((v[i] / (1 - beta2**t)).sqrt() + 1e-6) + decay * w
            ratios.append(float(w.norm() / u.norm()))
            weights[i] = w - lr * (min(ratios[-1], 1.0) if trust_clip else ratios[-1]) * u
        lamb.step()
    assert min(ratios) < 1 < max(ratios)
    assert_same(params, weights)


@over(EVERY)
def test_a_saved_optimizer_goes_on_bit_for_bit(make: Make) -> None:
    whole = make(parameters(), weight_decay=0.01)
    expected = walk(whole, range(6))

    first = make(parameters(), weight_decay=0.01)
    weights = walk(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make([nn.Parameter(w) for w in weights], weight_decay=0.01)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(walk(second, range(3, 6)), expected, strict=True))


@over(EVERY)
def test_the_closure_runs_first(make: Make) -> None:
    """Adaptation works on the gradients the closure makes, not on those of the step before."""

    def losses(optimizer: torch.optim.Optimizer, passed: bool) -> list[Tensor]:
        weights = optimizer.param_groups[0]["params"]
        values = []
        for _ in range(3):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = torch.stack([(w - 1).square().sum() for w in weights]).sum()
                loss.backward()
                return loss

            if passed:
                values.append(optimizer.step(closure).detach())
            else:
                values.append(closure().detach())
                optimizer.step()
        return values

    pair = [make(parameters(), weight_decay=0.1) for _ in range(2)]
    assert losses(pair[0], passed=True) == losses(pair[1], passed=False)


@over(EVERY)
def test_what_has_no_gradient_stays_and_gradients_are_left_as_they_are(make: Make) -> None:
    weights = parameters()
    untouched = weights[1].detach().clone()
    for p, g in zip(weights, tensors(1), strict=True):
        p.grad = g.clone()
    weights[1].grad = None
    optimizer = make(weights, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(weights[1], untouched)
    assert weights[1] not in optimizer.state
    assert torch.equal(weights[0].grad, tensors(1)[0])
    assert torch.equal(weights[2].grad, tensors(1)[2])


@over(EVERY)
def test_a_step_never_waits_for_the_device(make: Make) -> None:
    """Tensors without values raise as soon as Python asks for one."""
    with FakeTensorMode():
        weights = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))]
        optimizer = make(weights, weight_decay=0.1)
        for _ in range(2):
            for w in weights:
                w.grad = torch.zeros_like(w)
            optimizer.step()


def test_an_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'classic'"):
        LARS(parameters(), lr=1.0, momentum=0.9, weight_decay=0.0, variant="clasic")  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet18", num_classes=0)
        self.classifier = nn.Linear(4, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_every_trained_parameter_is_in_one_group() -> None:
    with torch.device("meta"):
        model = Model()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    for groups in (split_no_decay(model, plain_names=("classifier",)), layer_decayed(model, 0.7)):
        found = [id(p) for group in groups for p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == trained
    decayed, plain = sorted(split_no_decay(model, plain_names=("classifier",)), key=lambda g: g["plain"])
    assert all(p.ndim > 1 for p in decayed["params"])
    assert any(p is model.classifier.weight for p in plain["params"])
    assert plain["weight_decay"] == 0.0


def test_layers_nearer_the_input_learn_more_slowly() -> None:
    with torch.device("meta"):
        model = Model()
    scale = {id(p): g.get("lr_scale", 1.0) for g in layer_decayed(model, 0.5) for p in g["params"]}
    b = model.backbone
    path = [b.conv1, b.layer1[1].conv1, b.layer2[0].conv1, b.layer3[0].conv1, b.layer4[0].conv1, model.classifier]
    along = [scale[id(m.weight)] for m in path]
    assert along == sorted(along)
    assert len(set(along)) == len(along)
    assert along[-1] == 1.0
    with pytest.raises(UserError, match="four stages"):
        layer_decayed(nn.Sequential(nn.Linear(2, 2)), 0.5)


class Classifier(nn.Module):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0, **options)
        self.classifier = nn.Linear(self.backbone.num_features, 3)


@pytest.mark.parametrize(
    ("name", "options", "undecayed"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 2}, ["cls_token", "pos_embed", "reg_token"]),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, ["cls_token", "dist_token", "pos_embed"]),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1, 1, 1)},
            [f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(4)],
        ),
        (
            "xcit_nano_12_p8_224",
            {"depth": 1},
            ["blocks.0.attn.temperature", "cls_token", "pos_embed.token_projection.weight"],
        ),
        ("visformer_tiny", {}, ["pos_embed1", "pos_embed2", "pos_embed3"]),  # which lists none itself
    ],
)
def test_places_and_tokens_are_not_decayed(name: str, options: dict[str, Any], undecayed: list[str]) -> None:
    """They are apart whether or not biases are, with every layer-wise rate, and decayed only where it is asked for."""
    with torch.device("meta"):
        model = Classifier(name, **options)
    names = {id(p): n.removeprefix("backbone.") for n, p in model.named_parameters()}

    def plain(groups: list[dict[str, Any]]) -> list[str]:
        assert all(g["weight_decay"] == 0.0 for g in groups if g["plain"])
        assert sum(len(g["params"]) for g in groups) == len(names)
        return sorted(names[id(p)] for g in groups if g["plain"] for p in g["params"] if p.ndim > 1)

    assert plain(split_no_decay(model)) == undecayed
    assert plain(all_parameters(model)) == undecayed
    if name != "visformer_tiny":
        assert plain(layer_decayed(model, 0.5)) == undecayed
    assert plain(split_no_decay(model, decay_places=True)) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg"}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}),
        ("efficientnet_lite0", {}),
        ("regnetx_002", {}),
        ("xcit_nano_12_p8_224", {"depth": 2}),
    ],
)
def test_layers_of_other_networks_learn_as_fast_as_timm_lets_them(name: str, options: dict[str, Any]) -> None:
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=3, **options)
    ours = {id(p): g.get("lr_scale", 1.0) for g in layer_decayed(net, 0.65) for p in g["params"]}
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(net, layer_decay=0.65) for p in g["params"]}
    for name, p in net.named_parameters():
        assert ours[id(p)] == pytest.approx(theirs[id(p)]), name


def test_the_recipe_writes_rates_and_decay_into_groups() -> None:
    clock = Clock(examples=640, batch_size=64, epochs=10, steps_per_epoch=10)
    schedules: dict[str, Schedule] = {"lr": Cosine(1.0, 0.0), "weight_decay": Cosine(0.04, 0.2), "extra": Constant(7.0)}
    recipe = OptimizationRecipe(
        partial(LARS, momentum=0.9, weight_decay=0.04), lr=0.2, schedules=schedules, scaling="linear"
    )
    kernel, scaled, plain = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = recipe.build(
        [{"params": [kernel]}, {"params": [scaled], "lr_scale": 0.5}, {"params": [plain], "plain": True}], clock
    )
    values = recipe.values(50, clock)
    recipe.apply(optimizer, values)
    assert values["lr"] == pytest.approx(0.2 * 64 / 256 / 2)
    assert values["extra"] == 7.0
    assert [g["lr"] / values["lr"] for g in optimizer.param_groups] == [1.0, 0.5, 1.0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.12, 0.12, 0.04])
    assert OptimizationRecipe(LARS, lr=0.1, scaling="sqrt").peak_lr(4096) == pytest.approx(6.4)
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        OptimizationRecipe(LARS, lr=0.1, scaling="lienar")


CLOCK = Clock(examples=700, batch_size=100, epochs=10, steps_per_epoch=7)


def test_ends_of_a_stretch() -> None:
    ramps = {ends: Warmup(2, 0.0, Constant(1.0), ends=ends) for ends in ("left", "right", "both")}
    n = CLOCK.steps(2)
    assert [ramps["left"](0, CLOCK), ramps["left"](n, CLOCK)] == [0.0, 1.0]
    assert [ramps["right"](0, CLOCK), ramps["right"](n - 1, CLOCK)] == [1 / n, 1.0]
    assert [ramps["both"](0, CLOCK), ramps["both"](n - 1, CLOCK)] == [0.0, 1.0]
    last = CLOCK.total_steps - 1
    assert Cosine(1.0, 0.0, ends="both")(last, CLOCK) == Cosine(1.0, 0.0, ends="right")(last, CLOCK) == 0.0
    assert Cosine(1.0, 0.25)(last + 1, CLOCK) == Cosine(1.0, 0.25)(last + 500, CLOCK) == 0.25


def test_per_epoch_is_constant_within_an_epoch_and_meets_per_step_at_its_start() -> None:
    by_epoch, by_step = (Warmup(2, 0.0, Cosine(1.0, 0.0, per=per)) for per in ("epoch", "step"))
    for step in range(CLOCK.steps(2), CLOCK.total_steps):
        start = step - step % CLOCK.steps_per_epoch
        assert by_epoch(step, CLOCK) == by_epoch(start, CLOCK) == pytest.approx(by_step(start, CLOCK), abs=1e-12)


def test_a_warmup_as_long_as_the_run_rises_throughout() -> None:
    for epochs in (10, 40):
        values = [Warmup(epochs, 0.0, Cosine(1.0, 0.0))(step, CLOCK) for step in range(CLOCK.total_steps)]
        assert values == sorted(values)
        assert values[-1] == pytest.approx((CLOCK.total_steps - 1) / (epochs * 7))


def test_milestones_and_table_agree() -> None:
    steps = range(CLOCK.total_steps)
    drops = Milestones(0.1, 0.2, [6, 3])
    table = Table([(3, 0.1), (6, 0.02), (8, 0.004)])
    assert [drops(s, CLOCK) for s in steps] == pytest.approx([table(s, CLOCK) for s in steps])
    assert drops(3 * 7 - 1, CLOCK) == 0.1
    assert drops(3 * 7, CLOCK) == pytest.approx(0.02)


def test_lengths_of_a_run() -> None:
    assert CLOCK.total_steps == 70
    assert replace(CLOCK, total=2**20).total_steps == 2**20
    assert Clock(700, 100, epochs=0.5, steps_per_epoch=7).total_steps == 4
    # 800 epochs of ImageNet at 4096, the step count in the name of SimCLRv2's released checkpoints
    assert Clock(1281167, 4096, 800, 312, batches_cross_epochs=True).total_steps == 250228


def test_a_step_of_sam_that_breaks_off_leaves_the_weights_where_they_were() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, passes = SAM([weight], lr=0.1, base=torch.optim.SGD), []

    def closure() -> Tensor:
        if passes:
            raise InterruptedError
        passes.append(weight.clone())
        loss = weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(InterruptedError):
        optimizer.step(closure)
    assert torch.equal(weight, torch.ones(3))
