"""Evaluation on cached features: exact kNN against lightly's and solo-learn's, the probe against scikit-learn's.

solo-learn is no package to install: what its kNN does (vturrisi/solo-learn 9187ea3, solo/utils/knn.py) is written anew
in `as_solo_learn`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from turns import Comparison, compare

from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.knn import neighbours, true_class_ranks
from selfsight.evaluation.probes.linear import Standardise
from selfsight.evaluation.probes.logistic import fit_lbfgs

CLASSES, WIDTH, BANK = 10, 512, 50_000
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def run(rounds: int) -> list[Comparison]:
    return [*knn(rounds), probe(rounds)]


def clouds(count: int, seed: int, *, rotated: bool) -> Features:
    """Classes as clouds; ``rotated`` gives them the falling spectrum and the sign of features behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    middles = torch.randn(CLASSES, WIDTH, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, WIDTH, generator=generator)
    if not rotated:
        return Features(0.15 * middles[labels] + noise, labels, torch.arange(count))
    place = torch.arange(WIDTH)
    x = (0.55 * middles[labels] * (place < 40) + noise) / (place + 1)
    return Features((x @ turn + 0.1).relu(), labels, torch.arange(count))


def knn(rounds: int, queries: int = 2048, k: int = 200, temperature: float = 0.07) -> list[Comparison]:
    from lightly.utils.benchmarking import knn_predict

    train, test = clouds(BANK, 1, rotated=False), clouds(queries, 2, rotated=False)
    bank, asked = (torch.nn.functional.normalize(each.x, dim=1) for each in (train, test))
    columns = bank.T.contiguous()

    def ours() -> Tensor:
        similarity, index = neighbours(asked, bank, k)
        return true_class_ranks(similarity, train.labels[index], test.labels, [k], temperature, CLASSES)[k] < 1

    def lightly() -> Tensor:
        best = [knn_predict(part, columns, train.labels, CLASSES, k, temperature)[:, 0] for part in asked.split(256)]
        return torch.cat(best) == test.labels

    def solo_learn() -> Tensor:
        return as_solo_learn(asked, bank, train.labels, k, temperature) == test.labels

    found = []
    for name, peer, target in (("lightly", lightly, 1.15), ("solo_learn", solo_learn, 1.4)):
        same = (ours() == peer()).double().mean().item()
        assert same > 0.999, f"only {same:.2%} of the answers agree"
        found.append(
            compare(
                f"knn_{name}", ours, peer, items=queries, unit="ms/query", rounds=rounds, target=target,
                check=f"{same:.2%} of the answers agree",
            )
        )  # fmt: skip
    return found


def as_solo_learn(queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """The class that wins the vote of each query: neighbours in order, every vote a one-hot row of its own.

    At most five million similarities are held at a time, as by default there.
    """
    classes = int(labels.max()) + 1
    winners = []
    for part in queries.split(max(1, 5_000_000 // len(bank))):
        similarity, places = torch.mm(part, bank.T).topk(k, dim=1, largest=True, sorted=True)
        voters = labels.expand(len(part), -1).gather(1, places)
        ballots = torch.zeros(len(part) * k, classes).scatter_(1, voters.reshape(-1, 1), 1.0)
        votes = ballots.view(len(part), k, classes) * (similarity / temperature).exp()[:, :, None]
        winners.append(votes.sum(dim=1).sort(dim=1, descending=True).indices[:, 0])
    return torch.cat(winners)


def probe(rounds: int) -> Comparison:
    """Four penalties of ours beside one of scikit-learn's, both run to their own end at the same objective."""
    from sklearn.linear_model import LogisticRegression

    train, test = clouds(BANK, 1, rotated=True), clouds(10_000, 2, rotated=True)
    standardise = Standardise.of(train.x)
    x, asked, y = standardise(train.x), standardise(test.x), train.labels
    arrays = x.numpy(), y.numpy()
    one = PENALTIES.index(1e-4)

    def ours() -> tuple[Tensor, Tensor]:
        heads = fit_lbfgs(x, y, CLASSES, PENALTIES)
        return heads.weight[one], heads.bias[one]

    def sklearn() -> tuple[Tensor, Tensor]:
        head = LogisticRegression(C=1 / (PENALTIES[one] * BANK), max_iter=1000).fit(*arrays)
        return torch.from_numpy(head.coef_.T).float(), torch.from_numpy(head.intercept_).float()

    values, scores = zip(*(measured(*side(), x, y, asked, test.labels) for side in (ours, sklearn)), strict=True)
    assert values[0] <= values[1] + 1e-5, f"objective {values[0]:.6f} against scikit-learn's {values[1]:.6f}"
    assert abs(scores[0] - scores[1]) < 0.002, f"accuracy {scores[0]:.2%} against scikit-learn's {scores[1]:.2%}"
    return compare(
        "probe_sklearn", ours, sklearn, items=1, unit="s", rounds=rounds, target=5.0,
        check=f"objective {values[0]:.6f} and {values[1]:.6f}, accuracy {scores[0]:.2%} and {scores[1]:.2%}",
    )  # fmt: skip


def measured(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, asked: Tensor, truth: Tensor) -> tuple[float, float]:
    """Penalised objective on the training features, accuracy on the test ones."""
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.double() + bias.double(), y)
    objective = loss + PENALTIES[1] / 2 * weight.double().square().sum()
    right = (asked @ weight + bias).argmax(1) == truth
    return objective.item(), right.double().mean().item()
