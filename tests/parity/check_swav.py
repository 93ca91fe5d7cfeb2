"""The numbers of the SwAV authors' code (facebookresearch/swav: both main files and src/resnet50.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from selfsight.checkpoints.swav import from_official, official_names
from selfsight.contracts import Batch
from selfsight.losses.deepclusterv2 import UNASSIGNED, cluster_prediction, spherical_kmeans
from selfsight.losses.swav import sinkhorn, swapped_prediction
from selfsight.methods.swav import SwAV
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.prototypes import Prototypes
from selfsight.nn.queue import Queue
from selfsight.optim.lars import LARC
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Cosine, Warmup

from ..distributed.spawn import run_on
from .harness import Case, family, load_file

TOLERANCE = 1e-9


# --- codes and loss ------------------------------------------------------------------------------------------------


@family("swav", "sinkhorn_")
def codes_of_scores(case: Case) -> None:
    options = {"epsilon": case.number("epsilon"), "iterations": case.number("iterations")}
    case.compare("codes", sinkhorn(case.tensor("scores"), **options), TOLERANCE)


@family("swav", "sinkhorn_float32")
def codes_in_float32(case: Case) -> None:
    scores = case.tensor("scores", None)
    codes = sinkhorn(scores, epsilon=case.number("epsilon"), iterations=case.number("iterations"))
    assert scores.dtype == codes.dtype == torch.float32
    case.compare("codes", codes, 1e-4 if case.name.startswith("sinkhorn_float32_overflow") else 2e-6)


def sinkhorn_on(rank: int, scores: Tensor, options: dict[str, Any]) -> Tensor:
    return sinkhorn(scores[rank], **options)


@family("swav", "sinkhorn_#rank", slow=True)
def codes_on_processes(case: Case) -> None:
    scores = case.tensor("scores")
    options = {"epsilon": case.number("epsilon"), "iterations": case.number("iterations")}
    case.compare("codes", torch.stack(run_on(len(scores), sinkhorn_on, scores, options)), TOLERANCE)


class NoBackbone(nn.Module):
    """Stands where cases begin at embeddings."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def build(backbone: nn.Module, hp: dict[str, Any], **options: Any) -> SwAV:
    """The method with the hyper-parameters of a case in float64; without a queue unless asked."""
    defaults = {
        "hidden_dim": 0, "dim": backbone.num_features, "num_prototypes": 2, "hard_codes": False,
        "freeze_prototypes_steps": 0, "queue_length": 0, "queue_start_epoch": 0, "batch_size": 1,
    }  # fmt: skip
    taken = {
        name: hp[theirs]
        for name, theirs in {
            "temperature": "temperature", "epsilon": "epsilon", "sinkhorn_iterations": "iterations",
            "crops_for_assign": "crops_for_assign",
        }.items()
    }  # fmt: skip
    return SwAV(backbone, **(defaults | taken | options)).double()


def hyperparameters(case: Case) -> dict[str, Any]:
    plain = {"temperature": 0.1, "epsilon": 0.05, "iterations": 3, "crops_for_assign": [0, 1]}
    return plain | {name: case.number(name) for name in case.hp}


def fill(queue: Queue, rows: Tensor) -> None:
    """Rows in the authors' order, the newest first; zeros stand where nothing has come yet."""
    filled = int((rows != 0).any(dim=1).sum())
    queue.push(rows[:filled].flip(0))


def contents(queue: Queue) -> Tensor:
    """The queue in the authors' order."""
    rows = queue.oldest_first().flip(0)
    return torch.cat([rows, rows.new_zeros(len(queue) - len(rows), rows.shape[1])])


def step_from_embeddings(method: SwAV, z: Tensor, scores: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, loss and gradient of crop-major embeddings and scores, as the training step goes on from them."""
    scores = scores.unflatten(0, (-1, batch_size)).requires_grad_()
    codes = method.codes(z.unflatten(0, (-1, batch_size)), scores.detach())
    method.commit()
    loss = swapped_prediction(scores, codes, method.A, temperature=method.temperature)
    (gradient,) = torch.autograd.grad(loss, scores)
    return codes, loss.detach(), gradient.flatten(0, 1)


@family("swav", "loss_")
def loss(case: Case) -> None:
    hp, scores = hyperparameters(case), case.tensor("scores")
    method = build(NoBackbone(1), hp, num_prototypes=max(2, scores.shape[1]))
    codes, value, gradient = step_from_embeddings(method, scores, scores, hp["batch_size"])
    case.compare("codes", codes, TOLERANCE)
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_scores", gradient, TOLERANCE)


@family("swav", "queueloss_")
def loss_with_queue(case: Case) -> None:
    hp, queue, P = hyperparameters(case), case.tensor("queue"), case.tensor("prototypes")
    K, D = P.shape
    method = build(NoBackbone(D), hp, num_prototypes=K, queue_length=queue.shape[1])
    method.prototypes.weight.data.copy_(P)
    for ours, theirs in zip(method.queues, queue, strict=True):
        fill(ours, theirs)  # type: ignore[arg-type]
    case.compare("queue_used", int(method.queue_in_use), 0)
    codes, value, gradient = step_from_embeddings(
        method, case.tensor("embedding"), case.tensor("scores"), hp["batch_size"]
    )
    case.compare("codes", codes, TOLERANCE)
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_scores", gradient, TOLERANCE)
    case.compare("queue", torch.stack([contents(q) for q in method.queues]), TOLERANCE)  # type: ignore[arg-type]


def loss_on(rank: int, hp: dict[str, Any], arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """One process of a case with a leading dimension of processes. Every process holds the queues of all."""
    B, P, queue = hp["batch_size_per_rank"], arrays["prototypes"], arrays.get("queue")
    W, (K, D) = hp["world_size"], P.shape
    length = 0 if queue is None else W * queue.shape[2]
    method = build(NoBackbone(D), hp, num_prototypes=K, queue_length=length)
    method.prototypes.weight.data.copy_(P)
    if queue is not None:
        for ours, theirs in zip(method.queues, queue.unflatten(2, (-1, B)).permute(1, 2, 0, 3, 4), strict=True):
            fill(ours, theirs.flatten(0, 2))  # type: ignore[arg-type]
    codes, value, gradient = step_from_embeddings(method, arrays["embedding"][rank], arrays["scores"][rank], B)
    found = {"codes": codes, "loss": value, "grad_scores": gradient}
    if queue is not None:
        rows = torch.stack([contents(q) for q in method.queues])  # type: ignore[arg-type]
        found["queue"] = rows.unflatten(1, (-1, W, B))[:, :, rank].flatten(1, 2)
    return found


@family("swav", "loss_#rank", "queueloss_#rank", slow=True)
def loss_on_processes(case: Case) -> None:
    hp = hyperparameters(case)
    ranks = run_on(hp["world_size"], loss_on, hp, {name: case.tensor(name) for name in case.inp})
    for name in case.out:
        case.compare(name, torch.stack([found[name] for found in ranks]), TOLERANCE)


@family("swav", "queue_roll")
def queue_over_epochs(case: Case) -> None:
    hp, z, P = hyperparameters(case), case.tensor("embedding"), case.tensor("prototypes")
    K, D = P.shape
    B = hp["batch_size"]
    method = build(NoBackbone(D), hp, num_prototypes=K, queue_length=hp["queue_length"], batch_size=B)
    method.clock = Clock(1, B, hp["epochs"], hp["steps_per_epoch"])
    method.prototypes.weight.data.copy_(P)
    queues, used, losses = [], [], []
    for step, embedding in enumerate(z):
        method.begin_step(step)
        used.append(int(method.queue_in_use))
        _, value, _ = step_from_embeddings(method, embedding, embedding @ P.T, B)
        losses.append(value)
        queues.append(torch.stack([contents(q) for q in method.queues]))  # type: ignore[arg-type]
    case.compare("queue_used", used, 0)
    case.compare("queue", torch.stack(queues), TOLERANCE)
    case.compare("loss", torch.stack(losses), TOLERANCE)


@family("swav", "prototype_normalise")
def prototype_normalise(case: Case) -> None:
    weight = case.tensor("weight")
    prototypes = Prototypes(weight.shape[1], len(weight)).double()
    prototypes.weight.data.copy_(weight)
    prototypes.normalise()
    case.compare("weight", prototypes.weight, TOLERANCE)


# --- the network and whole steps -----------------------------------------------------------------------------------


class TinyNet(nn.Module):
    """ResNet of the cases in timm's interface: widths ``base_width`` (1, 2, 4, 8), torchvision's blocks and names."""

    def __init__(self, base_width: int, blocks_per_stage: list[int], bottleneck: bool) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(base_width), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages, width = len(blocks_per_stage), base_width
        for stage, blocks in enumerate(blocks_per_stage):
            planes, layers = base_width * 2**stage, []
            for j in range(blocks):
                stride = 2 if stage and not j else 1
                out = planes * block.expansion
                shortcut = None
                if stride > 1 or width != out:
                    shortcut = nn.Sequential(conv1x1(width, out, stride), nn.BatchNorm2d(out))
                layers.append(block(width, planes, stride, shortcut))
                width = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.num_features, self.calls = width, 0

    def forward_features(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


def tiny(case: Case, **options: Any) -> SwAV:
    """The method on the network that several cases share, its weights read as the authors' checkpoints are."""
    shared = [name for name in load_file(case.file) if name.startswith("tinynet")]
    net = case.sibling(next((name for name in shared if case.name.endswith(name.removeprefix("tinynet"))), shared[0]))
    hp = {name: net.number(name) for name in net.hp}
    backbone = TinyNet(hp["base_width"], hp["blocks_per_stage"], bool(hp["block"]))
    sizes = {"hidden_dim": hp["hidden"], "dim": hp["out_dim"], "num_prototypes": hp["nmb_prototypes"]}
    method = build(backbone, hyperparameters(case), **(sizes | options))
    method.load_state_dict(method.state_dict() | from_official(net.tensors("sd__")))
    return method


@family("swav", "tinynet")
def tinynet(case: Case) -> None:
    state = case.tensors("sd__")
    found = official_names(tiny(case).state_dict())
    assert set(found) == set(state), "the names of a checkpoint go in and out again"
    assert all(torch.equal(found[name], state[name]) for name in state)


def crops(case: Case, prefix: str = "crop") -> list[Tensor]:
    return [case.tensor(f"{prefix}{i}") for i in range(sum(name.startswith(prefix) for name in case.inp))]


@family("swav", "multires_")
def several_resolutions(case: Case) -> None:
    method = tiny(case).train(bool(case.number("training")))
    feature = multi_crop(method.backbone, crops(case))
    z = method.embed(feature)
    assert method.backbone.calls == case.number("n_backbone_calls")
    case.compare("feature", feature, TOLERANCE)
    case.compare("embedding", z, TOLERANCE)
    case.compare("scores", method.prototypes(z), TOLERANCE)
    state = official_names(method.state_dict())
    for name in case.out:
        if name.startswith("sd__"):
            case.compare(name, state[name.removeprefix("sd__")], TOLERANCE)


@family("swav", "fullstep")
def full_step(case: Case) -> None:
    method = tiny(case)
    views = crops(case)
    value = method.training_step(Batch(views, torch.arange(len(views[0]))), 0)["loss"]
    value.backward()
    method.on_before_optimizer_step(None)  # type: ignore[arg-type]
    gradients = official_names({name: p.grad for name, p in method.named_parameters()})  # type: ignore[misc]
    case.compare("loss", value, TOLERANCE)
    for name in case.out:
        if name.startswith("grad__"):
            case.compare(name, gradients[name.removeprefix("grad__")], TOLERANCE)


@family("swav", "e2e_tiny")
def end_to_end(case: Case) -> None:
    hp = hyperparameters(case)
    B, n = hp["batch_size"], hp["iters_per_epoch"]
    method = tiny(
        case,
        freeze_prototypes_steps=hp["freeze_prototypes_niters"],
        queue_length=hp["queue_length"],
        queue_start_epoch=hp["epoch_queue_starts"],
        batch_size=B,
    )
    options = {name: hp[name] for name in ("weight_decay", "momentum", "trust_coefficient")}
    base = hp["base_lr"]
    schedule = Warmup(hp["warmup_epochs"], hp["start_warmup"] / base, Cosine(1.0, hp["final_lr"] / base), ends="both")
    recipe = OptimizationRecipe(partial(LARC, **options), base, {"lr": schedule})
    method.configure(recipe, Clock(n * B, B, hp["epochs"], n))
    optimizer = method.configure_optimizers()
    batches = [Batch(crops(case, f"batch{j}_crop"), torch.arange(B)) for j in range(n)]
    losses, rates, prototypes, queues = [], [], [], []
    for step in range(n * hp["epochs"]):
        method.begin_step(step)
        optimizer.zero_grad()
        value = method.training_step(batches[step % n], step % n)["loss"]
        value.backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        losses.append(value.detach())
        rates.append(optimizer.param_groups[0]["lr"])
        prototypes.append(method.prototypes.weight.detach().clone())
        if (step + 1) % n == 0 and method.epoch >= hp["epoch_queue_starts"]:
            queues.append(torch.stack([contents(q) for q in method.queues]))  # type: ignore[arg-type]
    tolerance = 1e-7
    case.compare("loss", torch.stack(losses), tolerance)
    case.compare("lr", rates, TOLERANCE)
    case.compare("prototypes", torch.stack(prototypes), tolerance)
    case.compare("queue", torch.stack(queues), tolerance)
    state = official_names(method.state_dict())
    for name in case.out:
        if name.startswith("sd__"):
            case.compare(name, state[name.removeprefix("sd__")], tolerance)


# --- DeepCluster-v2 ------------------------------------------------------------------------------------------------


@family("swav", "dcv2_kmeans")
def kmeans(case: Case) -> None:
    memory, index, permutation = case.tensor("memory"), case.tensor("index"), case.tensor("permutation")
    assigned = torch.full((len(permutation), case.number("size_dataset")), UNASSIGNED)
    for h, K in enumerate(case.number("heads")):
        bank = memory[h % len(memory)]
        centroids, nearest = spherical_kmeans(bank, bank[permutation[h, :K]], case.number("iterations"))
        assigned[h, index] = nearest
        case.compare(f"centroids{h}", centroids, TOLERANCE)
    case.compare("assignments", assigned, 0)


@family("swav", "dcv2_loss")
def cluster_loss(case: Case) -> None:
    scores = [case.tensor(f"scores{h}", requires_grad=True) for h in range(len(case.number("heads")))]
    clusters = case.tensor("assignments")[:, case.tensor("index")]
    value = cluster_prediction(scores, clusters, temperature=case.number("temperature"))
    value.backward()
    case.compare("loss", value, TOLERANCE)
    for h, s in enumerate(scores):
        case.compare(f"grad_scores{h}", s.grad, TOLERANCE)
