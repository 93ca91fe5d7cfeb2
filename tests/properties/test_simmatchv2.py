"""What must hold of the semi-supervised losses and methods whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.backbones.wide_resnet import Unit, WideResNet, wrn_37_2
from selfsight.contracts import Batch, SemiBatch
from selfsight.errors import UserError
from selfsight.losses import semi as terms
from selfsight.losses import simmatchv2 as losses
from selfsight.methods.semi.alignment import Alignment, QueueAlignment
from selfsight.methods.semi.base import write_rows
from selfsight.methods.semi.flexmatch import FlexMatch
from selfsight.methods.semi.mixmatch import frozen_statistics
from selfsight.methods.semi.simmatchv2 import SimMatchV2

from ..semi_supervised import CLASSES, LABELS, SETTINGS, accuracy, batch, make, train


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(random(*shape, seed=seed, dtype=dtype), dim=-1)


def distribution(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * random(*shape, seed=seed, dtype=dtype)).softmax(-1)


# --- propagation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99])
def test_propagation_is_the_walk_that_stops_with_probability_one_minus_alpha(alpha: float) -> None:
    adjacency = losses.graph(unit(3, 6, 8), 0.1)
    weights = losses.propagation(adjacency, alpha)
    walk, step = torch.zeros(3, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[0].expand(3, -1)
    for _ in range(4000):
        walk, step = walk + (1 - alpha) * step, alpha * (step[:, None] @ adjacency)[:, 0]
    torch.testing.assert_close(weights, walk, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_graph_has_no_loops_and_its_rows_sum_to_one() -> None:
    adjacency = losses.graph(unit(4, 5, 8), 0.07)
    assert (adjacency.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(adjacency.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert not torch.allclose(adjacency, adjacency.transpose(1, 2)), "rows are normalised, not both sides"


def refined(
    z: Tensor, p: Tensor, bank: Tensor, labels: Tensor, n: int = 4, alpha: float = 0.3, t: float = 0.1
) -> Tensor:
    return losses.refine(z, p, bank, labels, n=n, t=t, alpha=alpha)


def test_refined_labels_are_distributions_whatever_the_order_of_bank_and_classes() -> None:
    z, p, bank, labels = unit(7, 8), distribution(7, 5, seed=1), unit(20, 8, seed=2), torch.arange(20) % 5
    r = refined(z, p, bank, labels)
    torch.testing.assert_close(r.sum(1), torch.ones(7, dtype=torch.float64))
    assert (r >= 0).all()
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(refined(z, p, bank[rows], labels[rows]), r)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(refined(z, p[:, classes.argsort()], bank, classes[labels]), r[:, classes.argsort()])
    torch.testing.assert_close(refined(z[:1], p[:1], bank, labels), r[:1])  # a batch of one


def test_refinement_leans_to_the_neighbours_class_and_no_share_leaves_the_label() -> None:
    z, p, bank = unit(6, 8), distribution(6, 3, seed=1), unit(9, 8, seed=2)
    torch.testing.assert_close(refined(z, p, bank, torch.arange(9) % 3, alpha=0.0), p)
    everywhere_two = refined(z, p, bank, torch.full((9,), 2))
    assert (everywhere_two[:, 2] > p[:, 2]).all()
    # one labelled image in all: a graph of two nodes, on which the label is kept with weight 1 / (1 + alpha)
    lonely = refined(z, p, bank[:1], torch.tensor([2]), n=1, alpha=0.1)
    torch.testing.assert_close(lonely, (p + 0.1 * F.one_hot(torch.tensor(2), 3)) / 1.1)


# --- losses ------------------------------------------------------------------------------------------------------


def test_edges_stay_finite_at_low_temperature_in_float32() -> None:
    z, z_s, bank = unit(6, 16), unit(2, 6, 16, seed=1), unit(50, 16, seed=2)
    exact = losses.edge_edge(losses.log_edges(z_s, bank, 0.002), losses.log_edges(z, bank, 0.002).exp())
    low = z_s.float().requires_grad_()
    loss = losses.edge_edge(
        losses.log_edges(low, bank.float(), 0.002), losses.log_edges(z.float(), bank.float(), 0.002).exp()
    )
    loss.backward()
    assert exact > 100, "the probabilities themselves are zero in float32 here"
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert torch.isfinite(low.grad).all()


def test_equal_edges_are_the_least_edge_loss() -> None:
    z, bank = unit(5, 8), unit(30, 8, seed=1)
    k = losses.log_edges(z, bank, 0.1)
    entropy = -(k.exp() * k).sum(-1).mean()
    torch.testing.assert_close(losses.edge_edge(k[None], k.exp()), entropy)
    for seed in range(2, 6):
        assert losses.edge_edge(losses.log_edges(unit(1, 5, 8, seed=seed), bank, 0.1), k.exp()) > entropy


@pytest.mark.parametrize("labels", ["empty", "one class missing"])
def test_a_class_nobody_in_the_bank_has_silences_the_node_edge_loss(labels: str) -> None:
    z, bank, p = unit(2, 5, 8).requires_grad_(), unit(12, 8, seed=1), distribution(5, 3, seed=2)
    y = distribution(12, 3, seed=3) * torch.tensor([1.0, 1.0, 0.0] if labels == "one class missing" else [0.0])
    loss = losses.node_edge(losses.log_edges(z, bank, 0.1), p, y)
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()
    y[0, 2] = 1e-3  # one small trace is enough
    assert losses.node_edge(losses.log_edges(z, bank, 0.1), p, y + 1e-3) > 0


def test_labels_of_a_memory_are_weighted_in_full_precision() -> None:
    p, labels = distribution(5, 3).float(), distribution(40, 3, seed=1).float()
    z, bank = unit(5, 8).float(), unit(40, 8, seed=2).float()
    exact = terms.smoothed(p, z, bank, labels, 0.5, 0.9)
    torch.testing.assert_close(exact.sum(-1), torch.ones(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(terms.smoothed(p, z, bank, labels, 0.5, 0.9), exact)


@pytest.mark.parametrize("name", ["simmatch", "simmatchv2"])
def test_decay_of_all_parameters_or_of_kernels(name: str) -> None:
    assert [group["plain"] for group in make(name, decay="all").param_groups()] == [False]
    plain = [p for group in make(name).param_groups() if group["plain"] for p in group["params"]]
    assert plain
    assert all(p.ndim <= 1 for p in plain)


def test_masked_rows_count_in_the_denominator() -> None:
    logits, r = random(3, 8, 5), distribution(8, 5, seed=1)
    everyone, nobody = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    some = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)
    halves = losses.node_node(logits, r, some) + losses.node_node(logits, r, 1 - some)
    torch.testing.assert_close(halves, losses.node_node(logits, r, everyone))
    assert losses.node_node(logits, r, nobody) == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    bank, y, p, k = (
        unit(6, 4, seed=1),
        distribution(6, 3, seed=2),
        distribution(3, 3, seed=3),
        distribution(3, 6, seed=4),
    )

    def along_edges(z: Tensor) -> Tensor:
        edges = losses.log_edges(z, bank, 0.3)
        return losses.node_edge(edges, p, y) + losses.edge_edge(edges, k)

    assert torch.autograd.gradcheck(along_edges, random(2, 3, 4, seed=seed).requires_grad_())
    logits = random(5, 4, seed=seed).requires_grad_()
    mask, view = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64), distribution(4, seed=5)
    assert torch.autograd.gradcheck(lambda x: terms.fairness(x, mask, view, view.flip(0)), logits)


def test_losses_are_computed_in_full_precision_under_autocast() -> None:
    z, bank, p, y = unit(2, 4, 8), unit(40, 8, seed=1), distribution(4, 3, seed=2), distribution(40, 3, seed=3)
    single = [x.float() for x in (z, bank, p, y)]
    exact = losses.node_edge(losses.log_edges(*single[:2], 0.02), *single[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z.float() @ bank.float().T).dtype == torch.bfloat16
        loss = losses.node_edge(losses.log_edges(*single[:2], 0.02), *single[2:])
        weights = losses.propagation(losses.graph(unit(2, 3, 8, dtype=torch.float32), 0.1), 0.1)
    assert loss == exact
    assert weights.dtype == torch.float32
    half = losses.log_edges(z.bfloat16(), bank.bfloat16(), 0.02)
    assert half.dtype == torch.float32


def test_fairness_is_least_for_the_running_view_and_silent_without_a_mask() -> None:
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    one_each = 4 * torch.eye(4, dtype=torch.float64).repeat(2, 1)  # every class predicted twice
    mask = torch.ones(8, dtype=torch.float64)
    assert terms.fairness(one_each, mask, uniform, uniform) == pytest.approx(-math.log(4))
    # the same histogram, one class predicted with less confidence: further from the running view
    unsure = one_each.clone()
    unsure[[0, 4]] /= 8
    assert terms.fairness(unsure, mask, uniform, uniform) < -math.log(4)
    logits = random(8, 4).requires_grad_()
    silent = terms.fairness(logits, torch.zeros(8, dtype=torch.float64), uniform, uniform)
    silent.backward()
    assert silent == 0
    assert (logits.grad == 0).all()


def test_similarities_calibrate_classes_and_back() -> None:
    edges, p, labels = distribution(5, 12), distribution(5, 3, seed=1), torch.arange(12) % 3
    torch.testing.assert_close(terms.unfold(edges, torch.full_like(p, 1 / 3), labels), edges)
    assert (
        terms.unfold(edges, F.one_hot(torch.zeros(5, dtype=torch.int64), 3).double(), labels)[:, labels > 0].sum() == 0
    )
    smoothed = terms.aggregate(edges, p, labels, 0.9)
    torch.testing.assert_close(smoothed.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(terms.aggregate(edges, p, labels, 1.0), p)


def test_the_graph_joins_equal_pseudo_labels_only() -> None:
    p = F.one_hot(torch.tensor([0, 1, 0, 2]), 3).double()
    expected = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(terms.pseudo_label_graph(p, 0.8), expected)


# --- states ------------------------------------------------------------------------------------------------------


def test_alignment_undoes_a_bias_towards_a_class() -> None:
    bias = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(losses.align(bias.expand(4, -1), bias), torch.full((4, 3), 1 / 3, dtype=torch.float64))
    for align in (Alignment(3, 0.9).double(), QueueAlignment(3, 5).double()):
        for seed in range(30):
            p = align(0.5 * bias + 0.5 * distribution(256, 3, seed=seed))
            align.commit()
        torch.testing.assert_close(p.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.03)


def test_the_last_of_several_rows_for_one_place_stays() -> None:
    bank, rows = torch.zeros(4, 2), torch.arange(10.0).reshape(5, 2)
    write_rows(bank, torch.tensor([1, 3, 1, 0, 1]), rows)
    assert bank.tolist() == [[6, 7], [8, 9], [0, 0], [2, 3]]
    picked = torch.full((4,), -1)
    chosen = torch.tensor([True, False, True, False, False])
    write_rows(picked, torch.tensor([1, 3, 1, 0, 1]), torch.arange(5), chosen)
    assert picked.tolist() == [-1, 2, -1, -1]


def test_a_class_that_is_learned_late_gets_a_lower_threshold() -> None:
    method = make("flexmatch", tau=0.9)
    assert isinstance(method, FlexMatch)
    method.selected[:] = torch.tensor([0] * 24 + [1] * 12 + [2] * 4 + [-1] * 24)
    sure = torch.tensor([[0.97, 0.01, 0.01, 0.01]])
    method.confident(sure, Batch([sure], torch.tensor([0])))
    method.commit()  # counts anew
    assert method.learned.tolist() == pytest.approx([1, 0.5, 1 / 6, 0])
    hesitant = 0.07 * torch.eye(4) / 0.3 + torch.full((4, 4), 0.175 / 0.75)
    hesitant = hesitant / hesitant.sum(1, keepdim=True)
    assert float(hesitant[0, 0]) == pytest.approx(0.4, abs=0.01)
    mask = method.confident(hesitant, Batch([hesitant], torch.arange(4)))
    assert mask.tolist() == [0, 1, 1, 1]  # 0.9, 0.3, 0.08, 0


def test_while_nothing_is_chosen_flexmatch_keeps_its_thresholds() -> None:
    method = make("flexmatch")
    assert isinstance(method, FlexMatch)
    unsure = torch.full((3, CLASSES), 1 / CLASSES)
    assert method.confident(unsure, Batch([unsure], torch.arange(3))).tolist() == [1, 1, 1]  # thresholds start at 0
    method.commit()
    assert (method.learned == 0).all()


def test_frozen_statistics_normalise_by_the_batch_and_stay() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    x = 5 + random(16, 3, dtype=torch.float32)
    with frozen_statistics(net):
        y = net(x)
    assert y.mean().abs() < 1e-5
    assert (net[0].running_mean == 0).all()
    net(x)
    assert (net[0].running_mean > 0.1).all()


# --- the method --------------------------------------------------------------------------------------------------


def simmatchv2(**changes: object) -> SimMatchV2:
    method = make("simmatchv2", **changes)
    assert isinstance(method, SimMatchV2)
    return method


def test_the_mask_looks_at_the_aligned_label_and_not_at_the_refined_one() -> None:
    labels = torch.zeros(8, dtype=torch.int64)  # all neighbours say class 0, so r is surer of it than p
    method = simmatchv2(labels=labels, alpha=0.9, topn=8, da_m=None, norm_feat=False)
    first = batch(0, "simmatchv2")
    with torch.no_grad():
        (logits,) = (method.teacher_forward(first.unlabelled.views[0])[0][0],)
    between = float(logits.softmax(-1).amax(-1).max()) + 0.01
    method.tau = between
    result = method.training_step(first, 0)
    assert result["mask_rate"] == 0
    assert result["loss_nn"] == 0


def test_gradients_reach_the_student_alone_and_the_head_by_edges_alone() -> None:
    method = simmatchv2(lambda_ee=0.0, lambda_ne=0.0)
    method.training_step(batch(0, "simmatchv2"), 0)["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is None or (p.grad == 0).all() for p in method.heads.head.parameters())
    assert all((p.grad != 0).any() for p in method.heads.fc.parameters())
    scores = {name: network(batch(1, "simmatchv2").labelled.views[0]) for name, network in method.classifiers().items()}
    assert {name: y.shape for name, y in scores.items()} == {"student": (4, CLASSES), "teacher": (4, CLASSES)}
    optimized = {id(p) for group in method.param_groups() for p in group["params"]}
    assert optimized == {id(p) for p in method.student.parameters()}


def test_a_sample_is_not_its_own_neighbour_in_the_bank() -> None:
    method = simmatchv2(K=8)
    before = method.u_bank.data.clone()
    method.begin_step(0)
    method.training_step(batch(0, "simmatchv2"), 0)["loss"].backward()
    assert torch.equal(method.u_bank.data, before), "the bank moves after the step"
    method.end_step()
    assert (method.u_bank.data != before).all()
    torch.testing.assert_close(method.u_bank.data.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(method.u_labels.data.sum(1), torch.ones(8))


@pytest.mark.parametrize("eman", [True, False])
def test_the_teacher_follows_after_the_step_in_its_own_mode(eman: bool) -> None:
    method = simmatchv2(eman=eman)
    norm, student = method.teacher.module.backbone.norm, method.backbone.norm
    assert norm.training is not eman
    train(method, "simmatchv2", range(1))
    assert torch.equal(norm.running_mean, 0.1 * student.running_mean) is eman, "averaged, or its own"
    kernel, target = method.teacher.module.backbone.conv.weight, method.backbone.conv.weight
    distance = (kernel - target).norm()
    method.scheduled = {"teacher_momentum": 0.5}
    method.end_step()
    torch.testing.assert_close((kernel - target).norm(), 0.5 * distance)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_unlabelled_images_labels_are_for_the_monitor_alone(name: str) -> None:
    runs = []
    for known in (True, False):
        method = make(name)
        seen, _ = train(method, name, range(3), known=known)
        for step in seen:
            assert ("pseudo_label_accuracy" in step) is known
        runs.append((seen, method.state_dict()))
    (seen, state), (blind, blind_state) = runs
    for step, other in zip(seen, blind, strict=True):
        assert all(torch.equal(step[key], other[key]) for key in other)
    assert all(torch.equal(value, blind_state[key]) for key, value in state.items())


def test_unknown_labels_are_left_out_of_the_accuracy() -> None:
    method = simmatchv2()
    labels = torch.tensor([0, 1, -1, 2])
    p = F.one_hot(torch.tensor([0, 1, 2, 3]), 4).float()
    unlabelled = Batch([p], torch.arange(4), labels)
    found = method.monitors(torch.tensor([1.0, 0.0, 1.0, 1.0]), p, unlabelled)
    assert (found["mask_rate"], found["pseudo_label_accuracy"]) == (0.75, 0.5)
    assert "pseudo_label_accuracy" not in method.monitors(torch.ones(4), p, Batch([p], torch.arange(4)))


def test_all_labelled_images_are_neighbours_where_fewer_exist_than_asked_for() -> None:
    with pytest.warns(UserWarning, match="only 8 images are labelled"):
        assert simmatchv2(topn=128).n == 8


@pytest.fixture(scope="module")
def supervised() -> float:
    """Accuracy of what the labels alone teach."""
    method = make("fixmatch", lambda_u=0.0)
    train(method, "fixmatch", range(150), labelled=8, unlabelled=8)
    return accuracy(method, teacher=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_learns_more_than_its_labels_say(name: str, supervised: float) -> None:
    method = make(name)
    seen, _ = train(method, name, range(150), labelled=8, unlabelled=32)
    assert supervised < 0.85
    assert min(accuracy(method, teacher=False), accuracy(method, teacher=True)) > supervised + 0.05
    assert torch.stack([s["pseudo_label_accuracy"] for s in seen[-20:]]).mean() > supervised


def test_wrong_batches_and_labels_are_refused_in_a_sentence() -> None:
    method = make("fixmatch")
    right = batch(0, "fixmatch")
    with pytest.raises(UserError, match="got 1 views of each unlabelled image and needs 2"):
        method.training_step(SemiBatch(right.labelled, Batch(right.unlabelled.views[:1], right.unlabelled.indices)), 0)
    larger = [right.unlabelled.views[0], torch.zeros(8, 3, 7, 7)]
    with pytest.raises(UserError, match="one size"):
        method.training_step(SemiBatch(right.labelled, Batch(larger, right.unlabelled.indices)), 0)
    with pytest.raises(UserError, match="between 0 and 3"):
        make("fixmatch", labels=LABELS + 1)
    with pytest.raises(UserError, match=r"alpha of SimMatchV2 is 1\.0; a share from 0 to below 1 was expected"):
        make("simmatchv2", alpha=1.0)
    with pytest.raises(UserError, match="multiple"):
        make("mixmatch").training_step(batch(0, "mixmatch", labelled=4, unlabelled=5), 0)


# --- the network -------------------------------------------------------------------------------------------------


def first_units(net: WideResNet) -> list[Unit]:
    return [net.get_submodule(f"{info['module']}.layer.0") for info in net.feature_info]  # type: ignore[misc]


def test_the_raw_shortcut_is_an_option() -> None:
    quirky, standard = WideResNet(10, 1), WideResNet(10, 1, raw_shortcut=False)
    for net in (quirky, standard):
        net(random(2, 3, 16, 16, dtype=torch.float32)).square().sum().backward()
    assert [u.bn1.weight.grad is not None for u in first_units(quirky)] == [True, False, False]
    assert [u.bn1.weight.grad is not None for u in first_units(standard)] == [True, True, True]
    # dropped output or not, its statistics move
    assert all((u.bn1.running_mean != 0).any() for u in first_units(quirky))


def test_flavours_differ_in_biases_and_epsilons() -> None:
    def traits(flavour: str) -> tuple[int, list[float]]:
        net = WideResNet(10, 2, flavour=flavour)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        epsilons = sorted({m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)})
        return sum(m.bias is not None for m in convolutions), epsilons

    assert traits("usb") == (1, [1e-5, 1e-3])
    assert traits("torchssl") == (10, [1e-3])
    assert traits("simmatch") == (0, [1e-5])
    with pytest.raises(UserError, match="Did you mean 'usb'"):
        WideResNet(10, flavour="usbb")
    with pytest.raises(UserError, match="6 n \\+ 4"):
        WideResNet(11)


def test_maps_have_the_sizes_feature_info_says() -> None:
    net = wrn_37_2().eval()
    x = random(1, 3, 32, 32, dtype=torch.float32)
    seen: dict[str, torch.Size] = {}
    for info in net.feature_info:
        net.get_submodule(info["module"]).register_forward_hook(
            lambda _, __, y, name=info["module"]: seen.update({name: y.shape})
        )
    assert net(x).shape == (1, net.num_features)
    for info in net.feature_info:
        side = 32 // info["reduction"]
        assert seen[info["module"]] == (1, info["num_chs"], side, side)
    with pytest.raises(UserError, match="no option 'widen_factor'"):
        wrn_37_2(widen_factor=3)
