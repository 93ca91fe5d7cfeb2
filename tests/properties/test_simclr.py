"""SimCLRv2: what its loss, head, method, fine-tuning and checkpoints have to satisfy, whatever the numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.checkpoints.simclr import Pretrained, architecture, from_tensorflow, variable_names
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.distillation import distillation, distillation_with_labels
from selfsight.losses.ntxent import cross_view_logits, ntxent, unit
from selfsight.methods.finetune import FineTune, first_stages
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.nn.batchnorm import BiasedBatchNorm1d, BiasedBatchNorm2d
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.optim import LARS

from ..small import SmallNet, assert_resumes, batches, prepare

B, D = 5, 7


def views(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=g, dtype=dtype), torch.randn(B, D, generator=g, dtype=dtype)


def by_hand(z1: Tensor, z2: Tensor, tau: float, memory: Tensor | None = None) -> float:
    """Mean over all 2B anchors of equation 1, one anchor at a time."""
    h = [z / z.norm() for z in torch.cat([z1, z2])]
    total = 0.0
    for a in range(2 * B):
        others = [math.exp(float(h[a] @ h[k]) / tau) for k in range(2 * B) if k != a]
        others += [] if memory is None else [math.exp(float(h[a] @ m) / tau) for m in memory]
        total -= math.log(math.exp(float(h[a] @ h[(a + B) % (2 * B)]) / tau) / sum(others))
    return total / (2 * B)


def test_the_loss_is_equation_1() -> None:
    z1, z2 = views()
    memory = unit(torch.randn(4, D, dtype=torch.float64))
    for tau in (0.1, 0.7):
        assert float(ntxent(z1, z2, temperature=tau, reduction="mean_2n")) == pytest.approx(by_hand(z1, z2, tau))
        assert float(ntxent(z1, z2, temperature=tau)) == pytest.approx(2 * by_hand(z1, z2, tau))
        with_memory = ntxent(z1, z2, temperature=tau, memory=memory, reduction="mean_2n")
        assert float(with_memory) == pytest.approx(by_hand(z1, z2, tau, memory))


def test_the_loss_knows_neither_order_nor_length() -> None:
    z1, z2 = views()
    expected = ntxent(z1, z2, temperature=0.2)
    order, lengths = torch.randperm(B), torch.rand(B, 1, dtype=torch.float64) + 0.5
    for a, b in ((z2, z1), (z1[order], z2[order]), (z1 * lengths, z2)):
        torch.testing.assert_close(ntxent(a, b, temperature=0.2), expected, rtol=1e-12, atol=0)
    assert not torch.isclose(ntxent(z1, z2.roll(1, 0), temperature=0.2), expected)


def test_equal_projections_sit_at_chance() -> None:
    z = torch.ones(B, D)
    torch.testing.assert_close(ntxent(z, z, temperature=0.1), torch.tensor(2 * math.log(2 * B - 1)))
    method = simclr()
    prepare(method, torch.optim.SGD, 0.1, 1, 1)
    method.clock = type(method.clock)(B, B, 1, 1)
    assert method.chance_loss() == pytest.approx(2 * math.log(2 * B - 1))


def test_one_image_has_nothing_to_be_told_from() -> None:
    z = torch.randn(2, D, requires_grad=True)
    loss = ntxent(z[:1], z[1:], temperature=0.5)
    loss.backward()
    assert z.grad is not None
    assert loss.item() == 0.0
    assert float(z.grad.abs().max()) == 0.0


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(temperature: float) -> None:
    z1, z2 = (z.float().requires_grad_() for z in views())
    loss = ntxent(z1, z2, temperature=temperature)
    loss.backward()
    h = unit(torch.cat([z1, z2]).detach().double())
    s = (h @ h.T).fill_diagonal_(-2)
    positive = torch.cat([(h[:B] * h[B:]).sum(1)] * 2)
    # cold: the distance to the most similar other one; hot: the logarithm of the number of others
    limit = 2 * ((s.max(1).values - positive).mean() / temperature if temperature < 1 else math.log(2 * B - 1))
    assert loss.item() == pytest.approx(float(limit), rel=2e-3)
    assert z1.grad is not None
    assert z1.grad.isfinite().all()


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 100])
def test_chunks_change_nothing(chunk_size: int) -> None:
    results = []
    for chunk in (None, chunk_size):
        z1, z2 = (z.requires_grad_() for z in views())
        loss = ntxent(z1, z2, temperature=0.1, chunk_size=chunk, memory=unit(views(1)[0]))
        loss.backward()
        results.append((loss.detach(), z1.grad, z2.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_the_loss_is_computed_in_full_precision() -> None:
    z1, z2 = views(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ntxent(z1, z2, temperature=0.1)
    torch.testing.assert_close(loss, ntxent(z1.float(), z2.float(), temperature=0.1), rtol=0, atol=0)
    assert ntxent(*views(), temperature=0.1).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "has to be above 0"),
        ({"reduction": "sum_of_mean"}, "Did you mean 'sum_of_means'"),
        ({"z2": torch.zeros(B + 1, D)}, r"got \[5, 7\] and \[6, 7\]"),
    ],
)
def test_the_loss_refuses_in_a_sentence(change: dict[str, Any], words: str) -> None:
    z1, z2 = views()
    with pytest.raises(UserError, match=words):
        ntxent(**{"z1": z1, "z2": z2, "temperature": 0.1, **change})


def test_cross_view_logits_name_the_right_column() -> None:
    z1, _ = views()
    logits, labels = cross_view_logits(z1, z1, temperature=0.5)
    assert torch.equal(logits.argmax(1), labels)
    torch.testing.assert_close(logits.diagonal(), torch.full((B,), 2.0, dtype=torch.float64))


def test_distillation() -> None:
    student, teacher = (z.requires_grad_() for z in views())
    for tau in (0.1, 1.0, 4.0):
        plain = distillation(student, teacher, temperature=tau, tau2=False)
        torch.testing.assert_close(distillation(student, teacher, temperature=tau, tau2=True), plain * tau**2)
        p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
        torch.testing.assert_close(plain, -(p * q.log()).sum(1).mean())
        at_the_teacher = teacher.detach().clone().requires_grad_()
        distillation(at_the_teacher, teacher, temperature=tau, tau2=False).backward()
        assert at_the_teacher.grad is not None
        assert float(at_the_teacher.grad.abs().max()) < 1e-12
        assert teacher.grad is None


def test_distillation_without_any_label_is_the_soft_part() -> None:
    student, teacher = views()
    none = torch.full((B,), -1)
    both = distillation_with_labels(student, teacher, none, temperature=0.5, alpha=0.3)
    torch.testing.assert_close(both, 0.3 * distillation(student, teacher, temperature=0.5, tau2=False))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 2)])
def test_biased_batch_norm(shape: tuple[int, ...]) -> None:
    kind, plain = (BiasedBatchNorm1d, nn.BatchNorm1d) if len(shape) == 2 else (BiasedBatchNorm2d, nn.BatchNorm2d)
    ours, theirs = kind(4), plain(4)
    x, y = torch.randn(shape), torch.randn(shape)
    dims = [0, *range(2, len(shape))]
    gradients = []
    for norm in (ours, theirs):
        both = norm(x) * norm(y)  # a second forward before the first one's backward
        both.square().sum().backward()
        gradients.append((both.detach(), norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    expected = 0.9 * (0.9 + 0.1 * x.var(dims, unbiased=False)) + 0.1 * y.var(dims, unbiased=False)
    torch.testing.assert_close(ours.running_var, expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.eval()(x), nn.functional.batch_norm(x, ours.running_mean, ours.running_var))


def test_the_head_follows_the_authors_rules() -> None:
    head = ProjectionHead(64, 16, 3)
    assert [name for name, _ in head.named_parameters()] == [
        "0.linear.weight", "0.bn.weight", "0.bn.bias",
        "1.linear.weight", "1.bn.weight", "1.bn.bias",
        "2.linear.weight", "2.bn.weight",
    ]  # fmt: skip
    assert head.widths == [64, 64, 64, 16]
    assert head[0].linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    hidden = head.outputs(torch.randn(8, 64))
    assert hidden[2].min().item() == 0.0
    assert hidden[3].mean(0).abs().max().item() < 1e-5  # normalised and not shifted
    with pytest.raises(UserError, match="at least 1"):
        ProjectionHead(8, 8, 0)


def simclr(backbone: nn.Module | None = None, **changes: Any) -> SimCLRv2:
    settings: dict[str, Any] = {
        "temperature": 0.5, "projection_dim": 4, "projection_layers": 2, "reduction": "sum_of_means",
        "chunk_size": None, "memory": 0, "memory_momentum": 0.9, "online_classes": 0, "classifier_decay": 1e-4,
    }  # fmt: skip
    return SimCLRv2(backbone or SmallNet(), **{**settings, **changes})


def test_both_views_pass_the_network_together() -> None:
    method, batch = simclr(), batches([8, 8], 6, 1)[0]
    means = []
    method.backbone.stages[1].register_forward_hook(lambda _m, x, _y: means.append(x[0].mean((0, 2, 3))))
    method.training_step(batch, 0)
    assert len(means) == 1
    torch.testing.assert_close(method.backbone.stages[1].running_mean, 0.1 * means[0])
    assert int(method.projector[0].bn.num_batches_tracked) == 1


def test_the_online_classifier_goes_unnoticed_by_the_backbone() -> None:
    batch = batches([8, 8], 6, 1)[0]
    batch.labels = torch.arange(6) % 3
    gradients = []
    for classes in (0, 3):
        torch.manual_seed(0)
        method = simclr(online_classes=classes)
        method.training_step(batch, 0)["loss"].backward()
        gradients.append([p.grad for n, p in method.named_parameters() if not n.startswith("classifier")])
        plain = [id(p) for group in method.param_groups() if group["plain"] for p in group["params"]]
        if method.classifier is not None:
            assert id(method.classifier.weight) in plain
            assert float(method.classifier.weight.grad.abs().max()) > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_average_network_moves_once_an_optimiser_step() -> None:
    torch.manual_seed(0)
    method = simclr(memory=20, memory_momentum=0.5)
    assert method.average is not None
    start = method.average.module[1][0].linear.weight.clone()
    with torch.no_grad():
        method.projector[0].linear.weight.add_(1)
    for step, moved in ((0, 0.5), (0, 0.5), (1, 0.75)):  # two batches that add up to one step, then the next step
        method.begin_step(step)
        method.remember(torch.randn(4, 3, 8, 8))
        torch.testing.assert_close(method.average.module[1][0].linear.weight, start + moved)


@pytest.mark.parametrize("share", ["label_smoothing", "erasing", "ema"])
def test_shares_lie_between_nothing_and_all(share: str) -> None:
    with pytest.raises(UserError, match=f"{share} of FineTune is 2; a share from 0 to 1 was expected"):
        finetune(slim(), None, layer=0, **{share: 2})


def test_a_classifier_that_is_like_any_layer() -> None:
    torch.manual_seed(0)
    for plain in (True, False):
        method = finetune(slim(), None, layer=0, plain_classifier=plain)
        groups = {id(p): group["plain"] for group in method.param_groups() for p in group["params"]}
        assert groups[id(method.classifier.weight)] == plain
        assert bool(method.classifier.weight.any()) != plain


def test_the_memory_holds_keys_of_the_average_network() -> None:
    torch.manual_seed(0)
    method = simclr(memory=20, memory_momentum=1.0)
    assert method.memory is not None
    before = [p.clone() for p in method.average.parameters()]
    losses = []
    for step, batch in enumerate(batches([8, 8], 6, 3)):
        method.begin_step(step)
        losses.append(method.training_step(batch, 0)["loss"].item())
        method.end_step()
    assert method.memory.full
    torch.testing.assert_close(method.memory.data.norm(dim=1), torch.ones(20))
    assert all(torch.equal(a, b) for a, b in zip(before, method.average.parameters(), strict=True))
    assert not any(p.requires_grad for p in method.average.parameters())
    assert losses[0] < losses[1] < losses[2]  # the same network, ever more negatives
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    assert trained.isdisjoint(map(id, method.average.parameters()))


@pytest.mark.parametrize("memory", [0, 30])
def test_stop_and_go_on(memory: int) -> None:
    def make() -> SimCLRv2:
        method = simclr(memory=memory, online_classes=3)
        prepare(method, lambda groups, lr: LARS(groups, lr, momentum=0.9, weight_decay=1e-4), 1.0, 4, 2)
        return method

    data = batches([8, 8], 6, 4)
    for batch in data:
        batch.labels = batch.indices % 3
    assert_resumes(make, data, stop=3, steps=8)


def finetune(backbone: nn.Module, projector: ProjectionHead | None, **changes: Any) -> FineTune:
    settings: dict[str, Any] = {
        "layer": 1, "num_classes": 3, "freeze_projector": False, "freeze_after": -1,
        "frozen_statistics": True, "classifier_decay": 0.0,
    }  # fmt: skip
    return FineTune(backbone, projector=projector, **{**settings, **changes})


def changed_by_a_step(method: FineTune) -> set[str]:
    """Names in the state dict that a step of SGD changes."""
    before = {k: v.clone() for k, v in method.state_dict().items()}
    batch = Batch([torch.randn(6, 3, 32, 32)], torch.arange(6), torch.arange(6) % 3)
    nn.init.normal_(method.classifier.weight)
    parameters = [p for p in method.parameters() if p.requires_grad]
    method.train().training_step(batch, 0)["loss"].backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    assert all(p.grad is not None for p in parameters)
    return {k for k, v in method.state_dict().items() if not torch.equal(v, before[k]) and "tracked" not in k}


def slim() -> nn.Module:
    return create("resnet10_slim", stem="cifar", width=8)


def test_a_fresh_classifier_guesses() -> None:
    method = finetune(slim(), ProjectionHead(64, 8, 2))
    batch = Batch([torch.randn(6, 3, 16, 16)], torch.arange(6), torch.arange(6) % 3)
    assert method.training_step(batch, 0)["loss"].item() == pytest.approx(math.log(3))


def test_erasing_fills_one_box_of_some_images_with_noise() -> None:
    random.seed(0)
    method = finetune(slim(), None, layer=0, erasing=0.25)
    x = torch.full((400, 3, 24, 24), 7.0)
    y = method.erased(x)
    assert (x == 7).all(), "the views themselves stay"
    new = (y != 7).all(1)  # [B, 24, 24], all channels together
    assert torch.equal(new, (y != 7).any(1))
    hit = new.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for box in new[hit]:
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1), "a full rectangle"
        assert 0.01 < box.float().mean() < 0.36
    noise = y.permute(0, 2, 3, 1)[new]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert finetune(slim(), None, layer=0).erased(x) is x


@pytest.mark.parametrize(("layer", "frozen"), [(0, False), (1, False), (1, True), (2, False)])
def test_layers_kept_of_the_head(layer: int, frozen: bool) -> None:
    changed = changed_by_a_step(finetune(slim(), ProjectionHead(64, 8, 2), layer=layer, freeze_projector=frozen))
    kernels = {k for k in changed if k.startswith("projector") and k.endswith("linear.weight")}
    assert kernels == (set() if frozen else {f"projector.{j}.linear.weight" for j in range(layer)})
    assert {"projector.0.bn.running_var", "projector.1.bn.running_var", "backbone.conv1.weight"} <= changed


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_frozen_stages_stay(after: int, keep: bool) -> None:
    method = finetune(slim(), None, layer=0, freeze_after=after, frozen_statistics=keep)
    changed = changed_by_a_step(method)
    stages = ["conv1", "bn1", *(f"layer{i}" for i in range(1, after + 1))]
    frozen = tuple(f"backbone.{stage}." for stage in stages)
    moved = {k for k in changed if k.startswith(frozen)}
    assert all("running" in k for k in moved)
    assert bool(moved) == (not keep and after < 4)
    if after < 4:
        assert f"backbone.layer{after + 1}.0.bn2.weight" in changed


def test_stages_of_other_networks() -> None:
    net = create("convnext_atto")
    stem = {id(p) for name in first_stages(net, 0) for p in net.get_submodule(name).parameters()}
    assert stem == set(map(id, net.stem.parameters()))
    two = {id(p) for name in first_stages(net, 2) for p in net.get_submodule(name).parameters()}
    assert two == stem | {id(p) for p in net.stages[:2].parameters()}
    with pytest.raises(UserError, match="has 4"):
        first_stages(net, 5)
    assert finetune(slim(), ProjectionHead(64, 8, 2), layer=-1).classifier.in_features == 8
    with pytest.raises(UserError, match="from 0"):
        finetune(slim(), ProjectionHead(64, 8, 2), layer=3)
    with pytest.raises(UserError, match="0 layers"):
        finetune(slim(), None, layer=1)


MAP = json.loads((Path(__file__).parents[1] / "parity" / "golden" / "simclrv2_checkpoint_map.json").read_text())


def random_variables(entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {e["tf"]: rng.standard_normal(e["tf_shape"]).astype(np.float32) for e in entries}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("r50_1x_sk0", {"name": "simclr_resnet50"}),
        ("r50_1x_sk1", {"name": "simclr_resnet50", "sk_ratio": 0.0625}),
        ("r18_1x_sk0_cifar_stem", {"name": "simclr_resnet18", "stem": "cifar"}),
    ],
)
def test_names_of_the_authors(name: str, spec: dict[str, Any]) -> None:
    entries = MAP["variables"][name]
    shapes = {e["tf"]: e["tf_shape"] for e in entries}
    with torch.device("meta"):
        width, out = shapes["head_contrastive/nl_2/dense/kernel"]
        classifier = nn.Linear(*shapes["head_supervised/linear_layer/dense/kernel"])
        target = Pretrained(spec, create(**spec), ProjectionHead(width, out, 3), classifier)
    names = variable_names(target)
    flat = [(t, key if part == "backbone" else f"{part}.{key}") for t, (part, key) in names.items()]
    assert flat == [(e["tf"], e["torch"]) for e in entries]
    assert [list(getattr(target, part).state_dict()[key].shape) for part, key in names.values()] == [
        e["torch_shape"] for e in entries
    ]
    standing_in = {t: np.broadcast_to(np.float32(0), shape) for t, shape in shapes.items()}
    expected = {"stem": "imagenet", "in_chans": 3, "width": 1, "sk_ratio": 0.0, **spec}
    assert architecture(standing_in) == expected


def test_values_of_the_authors() -> None:
    variables = random_variables(MAP["variables"]["r18_1x_sk0_cifar_stem"])
    slots = {"global_step": np.array(7), "base_model/conv2d/kernel/Momentum": variables["base_model/conv2d/kernel"]}
    found = from_tensorflow({**variables, **slots})
    for tf, (part, key) in variable_names(found).items():
        value = getattr(found, part).state_dict()[key].numpy()
        order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
        np.testing.assert_array_equal(value.transpose(order) if order else value, variables[tf])


@pytest.mark.slow
def test_checkpoints_with_an_average_network() -> None:
    variables = random_variables(MAP["variables"]["r18_1x_sk0_cifar_stem"])
    average = {f"ema_model/{name}": -value for name, value in variables.items() if not name.startswith("head_superv")}
    mine, other = from_tensorflow({**variables, **average}), from_tensorflow({**variables, **average}, ema=True)
    torch.testing.assert_close(other.backbone.conv1.weight, -mine.backbone.conv1.weight)
    assert mine.classifier is not None
    assert other.classifier is None


@pytest.mark.slow
def test_checkpoints_that_do_not_fit() -> None:
    variables = random_variables(MAP["variables"]["r18_1x_sk0_cifar_stem"])
    with pytest.raises(UserError, match="none of SimCLR's"):
        from_tensorflow({"resnet/kernel": variables["base_model/conv2d/kernel"]})
    mean = "base_model/batch_normalization_3/moving_mean"
    with pytest.raises(UserError, match=f"1 variables are missing and 0 left over, '{mean}'"):
        from_tensorflow({k: v for k, v in variables.items() if k != mean})
    with pytest.raises(UserError, match="has 20 convolutions and 21 BatchNorms"):
        from_tensorflow({k: v for k, v in variables.items() if k != "base_model/conv2d_19/kernel"})
    with pytest.raises(UserError, match=r"shape \[9\] where"):
        from_tensorflow({**variables, mean: np.zeros(9, np.float32)})
