"""The numbers of the SimMatchV2 authors' code, and of the baselines' (mingkai-zheng/SimMatch, USB)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from selfsight.backbones.registry import create
from selfsight.backbones.wide_resnet import WideResNet
from selfsight.checkpoints.simmatchv2 import from_official, official_names
from selfsight.contracts import Batch, SemiBatch
from selfsight.losses import semi as terms
from selfsight.losses import simmatchv2 as losses
from selfsight.methods.semi.alignment import Alignment, QueueAlignment
from selfsight.methods.semi.base import SemiMethod
from selfsight.methods.semi.comatch import CoMatch
from selfsight.methods.semi.fixmatch import FixMatch
from selfsight.methods.semi.flexmatch import FlexMatch
from selfsight.methods.semi.freematch import FreeMatch
from selfsight.methods.semi.mixmatch import MixMatch
from selfsight.methods.semi.simmatch import SimMatch
from selfsight.methods.semi.simmatchv2 import SimMatchV2
from selfsight.nn.distributed import exchange
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Cosine, Schedule, Warmup, teacher_momentum

from ..distributed.spawn import run_on
from .harness import Case, compare, family

TOLERANCE, ROUNDED = 1e-9, 1e-6
LOSSES = ("loss_sup", "loss_nn", "loss_ee", "loss_ne")


class Pixels(nn.Module):
    """A backbone that hands its images on: the recorded tensors stand where a network's outputs would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.weight = nn.Parameter(torch.zeros(()))  # something to optimise

    def forward(self, x: Tensor) -> Tensor:
        return x


class Given(nn.Module):
    """Heads that cut recorded rows ``[logits | embedding]`` apart."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[:, : self.classes], rows[:, self.classes :]


def given_outputs(method: SemiMethod) -> SemiMethod:
    """``method`` in float64, with the recorded rows as the outputs of its networks."""
    method.heads = Given(method.num_classes)
    method.teacher.module = method.student
    method.scheduled = {"teacher_momentum": 1.0}
    return method.double()


def semi_batch(x: Tensor, y: Tensor, views: list[Tensor], index: Tensor, index_u: Tensor | None = None) -> SemiBatch:
    index_u = torch.arange(len(views[0])) if index_u is None else index_u
    return SemiBatch(Batch([x], index, y), Batch(views, index_u))


def simmatchv2(case: Case, backbone: nn.Module, classes: int, **options: Any) -> SimMatchV2:
    dims = case.inp["u_bank"].shape
    settings = {name: case.number(name) for name in ("t", "alpha", "topn", "lambda_nn", "lambda_ee", "lambda_ne")}
    method = SimMatchV2(
        backbone,
        labels=case.tensor("l_label_idx"),
        num_classes=classes,
        dim=dims[1],
        K=dims[0],
        tau=case.number("threshold"),
        da_m=case.number("da_m") if case.number("DA") else None,
        decay="all",
        **{"norm_feat": False, "eman": False, **settings, **options},
    )
    method.double()
    fill_banks(case, method)
    return method


def fill_banks(case: Case, method: SimMatchV2) -> None:
    method.l_bank.copy_(case.tensor("l_bank"))
    method.u_bank.data.copy_(case.tensor("u_bank"))
    if "u_labels" in case.inp:
        method.u_labels.data.copy_(case.tensor("u_labels"))
    for queue in (method.u_bank, method.u_labels):
        queue.pointer.fill_(int(case.inp["ptr"][0]) if "ptr" in case.inp else 0)
    if "da" in case.inp:
        method.da.copy_(case.tensor("da"))


def state(method: SimMatchV2) -> dict[str, Tensor]:
    assert torch.equal(method.u_bank.pointer, method.u_labels.pointer)
    return {
        "l_bank": method.l_bank.clone(),
        "u_bank": method.u_bank.data.clone(),
        "u_labels": method.u_labels.data.clone(),
        "da": method.da.clone(),
        "ptr": method.u_bank.pointer.reshape(1).clone(),
    }


@family("simmatchv2", "step_")
def step(case: Case) -> None:
    classes = case.inp["logits_x"].shape[1]
    weak = torch.cat([case.tensor("teacher_logits_u"), case.tensor("teacher_feat_u")], 1)
    x = torch.cat([case.tensor("logits_x"), case.tensor("teacher_feat_x")], 1).requires_grad_()
    strong = [
        torch.cat([logits, z], 1).requires_grad_()
        for logits, z in zip(case.tensor("logits_u"), case.tensor("feat_u"), strict=True)
    ]
    method = simmatchv2(case, Pixels(x.shape[1]), classes)
    given_outputs(method)
    before = {name: value.clone() for name, value in method.state_dict().items()}

    result = method.training_step(semi_batch(x, case.tensor("targets_x"), [weak, *strong], case.tensor("index")), 0)
    result["loss"].backward()
    method.end_step()
    for name in LOSSES:
        case.compare(name, result[name], TOLERANCE, scale="each")
    case.compare("loss_total", result["loss"], TOLERANCE, scale="each")
    case.compare("grad_total_logits_x", x.grad[:, :classes], TOLERANCE, scale="each")
    gradients = torch.stack([view.grad for view in strong])
    case.compare("grad_total_logits_u", gradients[..., :classes], TOLERANCE, scale="each")
    case.compare("grad_total_feat_u", gradients[..., classes:], TOLERANCE, scale="each")
    for name, value in state(method).items():
        case.compare(name, value, TOLERANCE, scale="each")

    method.load_state_dict(before)
    single_terms(case, method)


def single_terms(case: Case, method: SimMatchV2) -> None:
    """Targets, and each loss alone with its gradient, from the state before the step."""
    settings = {"t": method.t, "alpha": method.alpha}
    z = case.tensor("teacher_feat_u")
    p = method.align(case.tensor("teacher_logits_u").softmax(-1))
    r = losses.refine(z, p, case.tensor("l_bank"), method.l_labels, n=method.n, **settings)
    mask = (p.amax(-1) >= method.tau).double()
    case.compare("prob_ku", p, TOLERANCE, scale="each")
    case.compare("pseudo_label", r, TOLERANCE, scale="each")
    case.compare("mask", mask, 0)

    # the order of the neighbours is free: rows of the sample itself, sorted
    few = len(case.out["A"])
    nearest = (z[:few] @ case.tensor("l_bank").T).topk(method.n).indices
    adjacency = losses.graph(torch.cat([z[:few, None], case.tensor("l_bank")[nearest]], 1), method.t)
    weights = losses.propagation(adjacency, method.alpha)
    for name, row in (("A", adjacency[:, 0]), ("P", weights)):
        compare(row.sort().values, np.sort(case.out[name][:, 0]), TOLERANCE, scale="each", label=f"{case.name}: {name}")
        compare(row[:, 0], case.out[name][:, 0, 0], TOLERANCE, scale="each", label=f"{case.name}: {name}")
        case.compared.add(name)

    k = losses.log_edges(z, case.tensor("u_bank"), method.t).exp()
    logits_x, logits, feat = (case.tensor(n, requires_grad=True) for n in ("logits_x", "logits_u", "feat_u"))
    edges = losses.log_edges(feat, case.tensor("u_bank"), method.t)
    for name, value, at in (
        ("sup_logits_x", terms.cross_entropy(logits_x, case.tensor("targets_x")), logits_x),
        ("nn_logits_u", losses.node_node(logits, r, mask), logits),
        ("ee_feat_u", losses.edge_edge(edges, k), feat),
        ("ne_feat_u", losses.node_edge(edges, p, case.tensor("u_labels")), feat),
    ):
        (gradient,) = torch.autograd.grad(value, at, retain_graph=True)
        case.compare(f"grad_{name}", gradient, TOLERANCE, scale="each")


def small_method(classes: int, dim: int, labels: Tensor, K: int, da_m: float | None) -> SimMatchV2:
    weights = {"lambda_nn": 1.0, "lambda_ee": 1.0, "lambda_ne": 1.0}
    return SimMatchV2(
        Pixels(classes + dim), labels=labels, num_classes=classes, dim=dim, K=K, t=0.1, alpha=0.1,
        topn=1, tau=0.5, da_m=da_m, norm_feat=False, eman=False, decay="all", **weights,
    ).double()  # fmt: skip


@family("simmatchv2", "da_trajectory")
def da_trajectory(case: Case) -> None:
    probs = case.tensor("probs")
    method = small_method(probs.shape[-1], 2, torch.zeros(1, dtype=torch.int64), 4, case.number("da_m"))
    method.da.fill_(1 / probs.shape[-1])  # 1/C in float64
    states, aligned = [method.da[0].clone()], []
    for q in probs:
        aligned.append(method.align(q))
        method.commit()
        states.append(method.da[0].clone())
    case.compare("aligned", torch.stack(aligned), TOLERANCE, scale="each")
    case.compare("da_states", torch.stack(states), TOLERANCE, scale="each")


@family("simmatchv2", "bank_")
def banks(case: Case) -> None:
    classes, (rows, dim) = case.inp["u_labels"].shape[1], case.inp["u_bank"].shape
    method = small_method(classes, dim, case.tensor("l_label_idx"), rows, None)
    fill_banks(case, method)
    seen = []
    for z_u, p, z_x, index in zip(*(case.tensor(n) for n in ("feat_u", "prob_u", "feat_x", "index")), strict=True):
        method.remember(z_x, index, z_u, p)
        method.commit()
        seen.append(state(method))
    for name in ("u_bank", "u_labels", "l_bank"):
        case.compare(name, torch.stack([s[name] for s in seen]), TOLERANCE, scale="each")
    case.compare("ptr", torch.cat([s["ptr"] for s in seen]), 0)
    case.compare("l_labels_onehot", F.one_hot(method.l_labels, classes), 0)


def banks_and_da_on(rank: int, case: Case) -> dict[str, Any]:
    classes, (rows, dim) = case.inp["probs"].shape[-1], case.inp["u_bank"].shape
    method = small_method(classes, dim, case.tensor("l_label_idx"), rows, case.number("da_m"))
    method.da.fill_(1 / classes)
    fill_banks(case, method)
    seen: list[dict[str, Tensor]] = []
    for q, z_u, z_x, index in zip(
        *(case.tensor(n)[:, rank] for n in ("probs", "feat_u", "feat_x", "index")), strict=True
    ):
        p = method.align(q)
        method.remember(z_x, index, z_u, p)
        method.commit()
        seen.append({**state(method), "aligned": p})
    return {name: torch.stack([s[name] for s in seen]) for name in seen[0]}


@family("simmatchv2", "dist#_banks_da", slow=True)
def banks_and_da(case: Case) -> None:
    ranks = run_on(case.number("world"), banks_and_da_on, case)
    case.compare("aligned", torch.stack([r["aligned"] for r in ranks], 1), TOLERANCE, scale="each")
    for seen in ranks:
        case.compare("da_states", seen["da"][:, 0], TOLERANCE, scale="each")
        case.compare("ptr", seen["ptr"][:, 0], 0)
        for name in ("u_bank", "u_labels", "l_bank"):
            case.compare(name, seen[name], TOLERANCE, scale="each")


def shuffle_on(rank: int, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    shuffled = exchange(x[rank], order)
    return shuffled, exchange(shuffled, order.argsort())


@family("simmatchv2", "dist#_shuffle", slow=True)
def shuffle(case: Case) -> None:
    x = case.tensor("x")
    ranks = run_on(len(x), shuffle_on, x, case.tensor("idx_unshuffle").argsort())
    case.compare("shuffled", torch.stack([shuffled for shuffled, _ in ranks]), 0)
    assert torch.equal(torch.stack([back for _, back in ranks]), x)


class TinyEncoder(nn.Module):
    """The encoder of the trajectory cases: convolution, BatchNorm, ReLU, global mean."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))).mean((2, 3))


def trajectory_method(case: Case) -> SimMatchV2:
    """The method with the recorded weights, optimiser and schedules."""
    weights = case.tensors("main.")
    width, channels = weights["backbone.conv.weight"].shape[:2]
    flags = {name: bool(case.number(name)) for name in ("norm_feat", "eman")}
    method = simmatchv2(case, TinyEncoder(width, channels), len(weights["fc.bias"]), **flags)
    method.student.load_state_dict(ours(weights))
    method.teacher.module.load_state_dict(ours(weights))
    method.da.fill_(1 / method.num_classes)
    sgd = partial(
        torch.optim.SGD,
        momentum=case.number("momentum"),
        weight_decay=case.number("weight_decay"),
        nesterov=bool(case.number("nesterov")),
    )
    schedules: dict[str, Schedule] = {
        "lr": Warmup(case.number("warmup_epoch"), 0.0, Cosine(1.0, 0.0, per="epoch"), ends="right"),
        "teacher_momentum": teacher_momentum(case.number("ema_m")),
    }
    steps = case.number("iters_per_epoch")
    clock = Clock(examples=steps, batch_size=1, epochs=case.number("epochs"), steps_per_epoch=steps)
    method.configure(OptimizationRecipe(sgd, case.number("lr"), schedules), clock)
    return method.train()


def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name.startswith("backbone.") else f"heads.{name}": value for name, value in weights.items()}


def theirs(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix("heads."): value.clone() for name, value in network.state_dict().items()}


def walk(case: Case, method: SimMatchV2, rank: int | None = None) -> dict[str, Any]:
    """Train on the recorded batches; the losses of every iteration and everything at the end."""
    module = method if rank is None else DistributedDataParallel(method)
    optimizer = method.configure_optimizers()
    strong = sorted((n for n in case.inp if n.startswith("u_strong")), key=lambda n: int(n.removeprefix("u_strong")))
    names = ["x", "targets_x", "index", "u_weak", *strong]
    data = {name: case.tensor(name) if rank is None else case.tensor(name)[:, rank] for name in names}
    seen: dict[str, list[Any]] = {name: [] for name in (*LOSSES, "loss_total", "lr")}
    for i in range(len(data["x"])):
        views = [value[i] for name, value in data.items() if name.startswith("u_")]
        batch = semi_batch(data["x"][i], data["targets_x"][i], views, data["index"][i])
        method.begin_step(i)
        result = (method.training_step if rank is None else module)(batch, i)
        optimizer.zero_grad()
        result["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        for name in LOSSES:
            seen[name].append(result[name])
        seen["loss_total"].append(result["loss"].detach())
        seen["lr"].append(optimizer.param_groups[0]["lr"])
    end = {**theirs(method.student, "main."), **theirs(method.teacher.module, "ema."), **state(method)}
    return {**{name: torch.tensor(values, dtype=torch.float64) for name, values in seen.items()}, **end}


@family("simmatchv2", "traj_")
def trajectory(case: Case) -> None:
    method = trajectory_method(case)
    found = walk(case, method)
    found["eval_logits"] = method.eval().logits(case.tensor("x")[0]).detach()
    for name in case.out:
        case.compare(name, found[name], TOLERANCE, scale="each")


def walk_on(rank: int, case: Case) -> dict[str, Any]:
    method = trajectory_method(case)
    method.forward = method.training_step  # type: ignore[method-assign]  # what DDP calls
    return walk(case, method, rank)


@family("simmatchv2", "traj_#ranks_", slow=True)
def trajectory_on_two(case: Case) -> None:
    ranks = run_on(case.number("world"), walk_on, case)
    for name in case.out:
        per_rank = name in (*LOSSES, "loss_total")
        got = torch.stack([r[name] for r in ranks]) if per_rank else ranks[0][name]
        case.compare(name, got, TOLERANCE, scale="each")
    assert all(torch.equal(ranks[0]["u_bank"], other["u_bank"]) for other in ranks)


@family("simmatchv2", "ckpt_resnet50", slow=True)
def checkpoint(case: Case) -> None:
    keys = case.out["keys"].tolist()
    shapes = {key: [n for n in shape if n >= 0] for key, shape in zip(keys, case.out["shapes"].tolist(), strict=True)}
    labelled, classes = shapes["module.l_labels"]
    labels = torch.arange(labelled) % classes
    rows, dim = shapes["module.u_bank"]
    assert (labelled, rows) == (case.number("num_labeled_used_here"), case.number("K_used_here"))
    with torch.device("meta"):
        backbone = create("resnet50")
    with torch.device("cpu"):
        method = SimMatchV2(
            backbone.to_empty(device="cpu"), labels=labels, num_classes=classes, dim=dim, K=rows,
            t=0.1, alpha=0.1, topn=1, tau=0.7, lambda_nn=1.0, lambda_ee=1.0, lambda_ne=1.0, da_m=0.9, norm_feat=True,
            eman=False, decay="all",
        )  # fmt: skip
    named = official_names(method.state_dict())
    case.compare("keys", np.array(list(named)), 0)
    case.compare("shapes", np.array([[*v.shape, *[-1] * (4 - v.ndim)] for v in named.values()]), 0)
    method.load_state_dict(from_official({"state_dict": named, "epoch": 1}))
    assert torch.equal(method.l_labels, labels)


# --- baselines ---------------------------------------------------------------------------------------------------


@family("simmatchv2", "simmatch1_")
def simmatch1(case: Case) -> None:
    logits, z_w, z_s = case.tensor("teacher_logits_u"), case.tensor("teacher_feat_u"), case.tensor("feat_u")
    classes, aligns = logits.shape[1], bool(case.number("DA"))
    z_s.requires_grad_()
    method = SimMatch(
        Pixels(classes + z_w.shape[1]), labels=case.tensor("labels"), num_classes=classes,
        dim=z_w.shape[1], tt=case.number("tt"), st=case.number("st"), alpha=case.number("c_smooth"), tau=0.7,
        lambda_u=10.0, lambda_in=5.0, da_length=len(case.inp["DA_queue"]) if aligns else None, da_eps=0.0,
        teacher=True, bank_m=0.0, decay="all",
    ).double()  # fmt: skip
    method.bank.copy_(case.tensor("bank").T)
    if aligns:
        method.alignment.queue.copy_(case.tensor("DA_queue"))
        method.alignment.pointer.fill_(int(case.inp["DA_ptr"][0]))
    method.clock = Clock(examples=1, batch_size=1, epochs=2, steps_per_epoch=1)
    method.step = 1 if case.number("start_unlabel") else 0  # before the second epoch the unlabelled part waits

    p, q = method.targets(logits, z_w)
    case.compare("pseudo_label", p, TOLERANCE, scale="each")
    if method.epoch > 0:
        per_sample = terms.instance_consistency(z_s, method.bank, q, method.st)
        per_sample.mean().backward()
        case.compare("loss_in_per_sample", per_sample, TOLERANCE, scale="each")
        case.compare("grad_loss_in_feat_u", z_s.grad, TOLERANCE, scale="each")
    else:
        waiting = method.instance_loss(z_s, q)
        case.compare("loss_in_per_sample", waiting, TOLERANCE, scale="each")
    method.remember(case.tensor("teacher_feat_x"), case.tensor("targets_x"), case.tensor("index"))
    method.scheduled = {"teacher_momentum": 1.0}
    method.end_step()
    case.compare("bank", method.bank.T, TOLERANCE, scale="each")
    case.compare("labels", method.bank_labels, 0)
    if aligns:
        case.compare("DA_queue", method.alignment.queue, TOLERANCE, scale="each")
        case.compare("DA_ptr", method.alignment.pointer.reshape(1), 0)


@family("simmatchv2", "usb_consistency")
def consistency(case: Case) -> None:
    soft, hard, mask = case.tensor("soft"), case.tensor("hard"), case.tensor("mask")
    for name, function, *arguments in (
        ("ce_hard", terms.cross_entropy, hard, mask),
        ("ce_soft", terms.cross_entropy, soft, mask),
        ("ce_soft_nomask", terms.cross_entropy, soft),
        ("ce_hard_allmasked", terms.cross_entropy, hard, torch.zeros_like(mask)),
        ("mse", terms.squared_error, soft),
        ("mse_mask", terms.squared_error, soft, mask),
    ):
        logits = case.tensor("logits", requires_grad=True)
        value = function(logits, *arguments)
        value.backward()
        case.compare(name, value, TOLERANCE, scale="each")
        case.compare(f"grad_{name}", logits.grad, TOLERANCE, scale="each")


def run_thresholds(case: Case, method: SemiMethod, *buffers: str) -> dict[str, Tensor]:
    """T steps of a method whose network hands logits on; losses, gradients and the named buffers after each step."""
    given_outputs(method).heads = Only()
    seen: list[dict[str, Tensor]] = []
    for t in range(len(case.inp["logits_x"])):
        strong = case.tensor("logits_u_strong")[t].requires_grad_()
        views = [case.tensor("logits_u_weak")[t], strong]
        y, index_u = case.tensor("targets_x")[t], case.tensor("idx_u")[t]
        batch = semi_batch(case.tensor("logits_x")[t], y, views, torch.arange(len(y)), index_u)
        result = method.training_step(batch, t)
        result["loss"].backward()
        method.end_step()
        now = {
            "loss_sup": result["loss_sup"],
            "loss_unsup": result["loss_unsup"],
            "loss_total": result["loss"].detach(),
            "util_ratio": result["mask_rate"],
            "grad_total_logits_u_strong": strong.grad,
        }
        seen.append({**now, **{name: getattr(method, name).clone() for name in buffers}})
    found = {name: torch.stack([s[name] for s in seen]) for name in seen[0]}
    for name in ("loss_sup", "loss_unsup", "loss_total", "grad_total_logits_u_strong"):
        case.compare(name, found[name], TOLERANCE, scale="each")
    case.compare("util_ratio", found["util_ratio"], ROUNDED, scale="each")
    return found


class Only(nn.Module):
    """Heads that hand recorded logits on."""

    def forward(self, rows: Tensor) -> tuple[Tensor]:
        return (rows,)


def sizes(case: Case) -> dict[str, Any]:
    classes = case.inp["logits_x"].shape[-1]
    return {"labels": torch.arange(classes), "num_classes": classes}


@family("simmatchv2", "usb_fixmatch")
def fixmatch(case: Case) -> None:
    classes = case.inp["logits_x"].shape[-1]
    weights = {"tau": case.number("p_cutoff"), "lambda_u": case.number("lambda_u")}
    run_thresholds(case, FixMatch(Pixels(classes), **sizes(case), **weights, da_m=None))


@family("simmatchv2", "usb_flexmatch")
def flexmatch(case: Case) -> None:
    classes = case.inp["logits_x"].shape[-1]
    weights = {"tau": case.number("p_cutoff"), "lambda_u": case.number("lambda_u")}
    warmup, rows = bool(case.number("thresh_warmup")), case.number("num_unlabeled")
    method = FlexMatch(Pixels(classes), **sizes(case), **weights, da_m=None, warmup=warmup, num_unlabelled=rows)
    found = run_thresholds(case, method, "learned", "selected")
    case.compare("classwise_acc", found["learned"], TOLERANCE, scale="each")
    case.compare("selected_label", found["selected"], 0)


@family("simmatchv2", "usb_freematch")
def freematch(case: Case) -> None:
    classes = case.inp["logits_x"].shape[-1]
    method = FreeMatch(
        Pixels(classes),
        **sizes(case),
        lambda_u=case.number("lambda_u"),
        w_f=case.number("ent_loss_ratio"),
        m=case.number("ema_p"),
        quantile=bool(case.number("use_quantile")),
        clip=0.95 if case.number("clip_thresh") else None,
    ).double()
    for buffer in (method.tau, method.p_model, method.hist):
        buffer.fill_(1 / classes)  # 1/C in float64
    found = run_thresholds(case, method, "tau", "p_model", "hist")
    for theirs_, ours_ in (("time_p", "tau"), ("p_model", "p_model"), ("label_hist", "hist")):
        case.compare(theirs_, found[ours_], TOLERANCE, scale="each")


@family("simmatchv2", "usb_da_ema_")
def alignment(case: Case) -> None:
    follow = case.name.startswith("usb_da_ema_model")
    target = case.tensor("p_target")
    align = Alignment(len(target), case.number("momentum"), target, follow=follow).double()
    seen = []
    for q, q_labelled in zip(case.tensor("probs_u"), case.tensor("probs_x"), strict=True):
        aligned = align(q, q_labelled)
        align.commit()
        seen.append((aligned, align.model.clone(), align.target.clone()))
    for name, values in zip(("aligned", "p_model", "p_target"), zip(*seen, strict=True), strict=True):
        case.compare(name, torch.stack(values), TOLERANCE, scale="each")


@family("simmatchv2", "usb_da_queue")
def queue_alignment(case: Case) -> None:
    target = case.tensor("p_target")
    align = QueueAlignment(target.shape[1], case.number("queue_length")).double()
    align.target.copy_(target.mean(0))
    seen = []
    for q in case.tensor("probs_u"):
        aligned = align(q)
        align.commit()
        seen.append((aligned, align.queue.clone(), target))
    for name, values in zip(("aligned", "p_model", "p_target"), zip(*seen, strict=True), strict=True):
        case.compare(name, torch.stack(values), TOLERANCE, scale="each")


def rows_of(case: Case, *suffixes: str) -> list[Tensor]:
    """Recorded outputs as images ``[logits | embedding]``, gradient wanted; missing logits (CoMatch) are zeros."""
    found = []
    for suffix in suffixes:
        z = case.tensor(f"feat_{suffix}")
        empty = torch.zeros(len(z), case.inp["logits_x"].shape[1])
        logits = case.tensor(f"logits_{suffix}") if f"logits_{suffix}" in case.inp else empty
        found.append(torch.cat([logits, z], 1).requires_grad_())
    return found


@family("simmatchv2", "usb_comatch")
def comatch(case: Case) -> None:
    x, weak, strong, other = rows_of(case, "x", "u_weak", "u_s0", "u_s1")
    y, classes = case.tensor("targets_x"), case.inp["logits_x"].shape[1]
    method = CoMatch(
        Pixels(x.shape[1]), labels=y, num_classes=classes, dim=case.inp["feat_x"].shape[1],
        K=len(case.inp["queue_feats"]), T=case.number("T"), alpha=case.number("smoothing_alpha"),
        tau=case.number("p_cutoff"), tau_c=case.number("contrast_p_cutoff"), lambda_u=1.0, lambda_c=1.0,
        da_length=case.number("da_len"), queue_batches=case.number("queue_batch"),
    )  # fmt: skip
    given_outputs(method)
    for queue, name in ((method.memory, "queue_feats"), (method.memory_labels, "queue_probs")):
        queue.data.copy_(case.tensor(name))
        queue.pointer.fill_(int(case.inp["queue_ptr"]))
    place(case, method)
    result = method.training_step(semi_batch(x, y, [weak, strong, other], torch.arange(len(y))), 0)
    result["loss"].backward()
    method.end_step()
    case.compare("sup_loss", result["loss_sup"], TOLERANCE, scale="each")
    case.compare("unsup_loss", result["loss_unsup"], TOLERANCE, scale="each")
    case.compare("contrast_loss", result["loss_contrast"], TOLERANCE, scale="each")
    case.compare("total_loss", result["loss"], TOLERANCE, scale="each")
    case.compare("util_ratio", result["mask_rate"], ROUNDED, scale="each")
    case.compare("grad_logits_u_s0", strong.grad[:, :classes], TOLERANCE, scale="each")
    case.compare("grad_feat_u_s0", strong.grad[:, classes:], TOLERANCE, scale="each")
    case.compare("grad_feat_u_s1", other.grad[:, classes:], TOLERANCE, scale="each")
    case.compare("queue_feats", method.memory.data, TOLERANCE, scale="each")
    case.compare("queue_probs", method.memory_labels.data, TOLERANCE, scale="each")
    case.compare("queue_ptr", method.memory.pointer, 0)
    case.compare("p_model", method.alignment.queue, TOLERANCE, scale="each")


def place(case: Case, method: SemiMethod) -> None:
    """Set the clock to the recorded iteration and epoch, which the cases choose independently of each other."""
    method.step = case.number("it") if "it" in case.hp else 0
    method.__class__ = type("Placed", (type(method),), {"epoch": case.number("epoch")})


@family("simmatchv2", "usb_simmatch")
def simmatch(case: Case) -> None:
    x, weak, strong = rows_of(case, "x", "u_weak", "u_strong")
    classes, dim = case.inp["logits_x"].shape[1], case.inp["feat_x"].shape[1]
    method = SimMatch(
        Pixels(x.shape[1]), labels=case.tensor("labels_bank"), num_classes=classes, dim=dim,
        tt=case.number("T"), st=case.number("T"), alpha=case.number("smoothing_alpha"), tau=case.number("p_cutoff"),
        lambda_u=1.0,
        lambda_in=case.number("lambda_in"), da_length=case.number("da_len"), da_eps=1e-6, teacher=False,
        bank_m=case.number("ema_bank"), decay="kernels",
    )  # fmt: skip
    given_outputs(method)
    method.bank.copy_(case.tensor("mem_bank").T)
    place(case, method)
    result = method.training_step(semi_batch(x, case.tensor("targets_x"), [weak, strong], case.tensor("index")), 0)
    result["loss"].backward()
    method.end_step()
    case.compare("sup_loss", result["loss_sup"], TOLERANCE, scale="each")
    case.compare("unsup_loss", result["loss_unsup"], TOLERANCE, scale="each")
    case.compare("total_loss", result["loss"], TOLERANCE, scale="each")
    case.compare("util_ratio", result["mask_rate"], ROUNDED, scale="each")
    case.compare("grad_logits_u_strong", strong.grad[:, :classes], TOLERANCE, scale="each")
    case.compare("grad_feat_u_strong", strong.grad[:, classes:], TOLERANCE, scale="each")
    case.compare("mem_bank", method.bank.T, TOLERANCE, scale="each")
    case.compare("labels_bank", method.bank_labels, 0)


@family("simmatchv2", "usb_mixmatch")
def mixmatch(case: Case) -> None:
    weight = case.tensor("W")
    y, classes = case.tensor("targets_x"), weight.shape[1]
    method = MixMatch(
        Pixels(len(weight)), labels=y, num_classes=classes, T=case.number("T"),
        mixup_alpha=case.number("mixup_alpha"), lambda_u=case.number("lambda_u"), ramp=case.number("unsup_warm_up"),
    ).double()  # fmt: skip
    with torch.no_grad():
        method.heads.weight.copy_(weight.T)
        method.heads.bias.zero_()
    method.draw = lambda rows: (float(case.tensor("beta_sample")), case.tensor("perm"))  # type: ignore[method-assign]
    method.step = case.number("it")
    steps = case.number("num_train_iter")
    method.clock = Clock(examples=1, batch_size=1, epochs=1, steps_per_epoch=steps)
    batch = semi_batch(case.tensor("x_l"), y, [case.tensor("x_u1"), case.tensor("x_u2")], torch.arange(len(y)))
    result = method.training_step(batch, 0)
    result["loss"].backward()
    case.compare("sup_loss", result["loss_sup"], TOLERANCE, scale="each")
    case.compare("unsup_loss", result["loss_unsup"], TOLERANCE, scale="each")
    case.compare("total_loss", result["loss"], TOLERANCE, scale="each")
    case.compare("grad_W", method.heads.weight.grad.T, TOLERANCE, scale="each")


@family("simmatchv2", "usb_wrn_")
def wide_resnet(case: Case) -> None:
    four = case.name.startswith("usb_wrn_var")
    weights = case.tensors("p.")
    units = len({name.split(".")[2] for name in weights if name.startswith("block1.layer.")})
    stages = len({name.split(".")[0] for name in weights if name.startswith("block")})
    widen = weights["block1.layer.0.conv2.weight"].shape[0] // weights["conv1.weight"].shape[0]
    x, classes = case.tensor("x"), len(weights["classifier.bias"])
    options = {"stages": stages, "first_stride": 2 if four else 1, "num_classes": classes, "in_chans": x.shape[1]}
    network = WideResNet(6 * units + 4, widen, **options).double()
    network.load_state_dict(weights)
    network.eval()
    case.compare(
        "eval_feat", network.forward_head(network.forward_features(x), pre_logits=True), TOLERANCE, scale="each"
    )
    case.compare("eval_logits", network(x), TOLERANCE, scale="each")
    network.train()
    logits = network(x)
    logits.square().sum().backward()
    case.compare("train_logits", logits, TOLERANCE, scale="each")
    parameters = OrderedDict(network.named_parameters())
    case.compare("param_names", np.array(list(parameters)), 0)
    norms = [-1.0 if p.grad is None else float(p.grad.norm()) for p in parameters.values()]
    case.compare("grad_norms", np.array(norms), TOLERANCE, scale="each")
    for name in case.out:
        if name.startswith("after_train."):
            case.compare(name, network.state_dict()[name.removeprefix("after_train.")], TOLERANCE, scale="each")
