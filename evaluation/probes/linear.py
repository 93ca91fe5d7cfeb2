"""Linear probes on cached features, and the same with a few labels per class.

Regularisation and learning rate are chosen on a held-out part of the *training* set. The test set is only measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfsight.contracts import Targets
from selfsight.errors import UserError
from selfsight.evaluation.base import Figures
from selfsight.evaluation.features import Features, checked
from selfsight.evaluation.probes.balance import balanced
from selfsight.evaluation.probes.dims import with_dims
from selfsight.evaluation.probes.logistic import BLOCK, Linear, fit_lbfgs, fit_sgd
from selfsight.evaluation.probes.targets import linear_outputs, misfit, target_figures
from selfsight.evaluation.rows import BLOCK_ROWS, Rows, blocks, total
from selfsight.validation import above, at_least, takes, whole

HELD_OUT = 0.1
STANDARD_SHOTS = (1, 5, 20)
# Of few images an image or two decide the penalty: fits of at most so many numbers are in double precision, where
# neither the number of threads nor the processor makes it another one.
PRECISE = 2**21


@takes(penalties=at_least(0), folds=whole(2), seed=whole(0), dims=whole(1))
@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression by L-BFGS: every penalty at once, the best on held-out training images, refitted.

    Of images with several labels each label has a logistic regression of its own, of numbers each column a ridge
    regression, all with the same penalty: ``linear_map`` and ``linear_f1``, or ``linear_r2``; see `probes.targets`.

    Attributes:
        penalties: lambda in  mean cross-entropy + lambda / 2 |W|^2, the bias free, on features centred and scaled to
            unit average variance (sklearn's C is 1 / (lambda N)).
        folds: choose by cross-validation with so many parts; None: by one held-out tenth.
        seed: of the held-out split.
        device: where to fit; None: the GPU where there is one.
        dims: numbers of first features to look at as well, ascending, see `probes.dims`; None: all features alone.
    """

    penalties: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2)
    folds: int | None = None
    seed: int = 0
    device: str | None = None
    dims: Sequence[int] | None = None
    needs_labels = True
    takes_targets = True

    @property
    def protocol(self) -> str:
        where = f"by {self.folds}-fold cross-validation" if self.folds else f"on {HELD_OUT:.0%} of the training images"
        return (
            "linear probe: logistic regression (L-BFGS; ridge for numbers) on frozen un-augmented features, L2 out of "
            f"{len(self.penalties)} chosen {where}"
        )

    def __call__(self, train: Features, test: Features) -> Figures:
        if self.dims is not None:
            return with_dims(self, train, test)
        targets = train.targets is not None and test.targets is not None
        train, test = (part.to(self.device) for part in checked(train, test, blocks=not targets))
        if train.targets is not None and test.targets is not None:
            standardise = Standardise.of(train.x)
            return self._of_targets(standardise(train.x), train.targets, standardise(test.x), test.targets)
        if max(train.x.numel(), test.x.numel()) <= PRECISE and train.x.device.type != "mps":  # which has no doubles
            train, test = replace(train, x=train.x.double()), replace(test, x=test.x.double())
        standardise = Standardise.of(train.x)
        x: Tensor | Rows = Rows(train.x, standardise) if train.large else standardise(train.x)
        others: Tensor | Rows = Rows(test.x, standardise) if test.large else standardise(test.x)
        y, classes = train.known_labels, train.classes
        merits = torch.zeros(len(self.penalties), 2, dtype=torch.float64, device=x.device)
        parts = folds(y, self.folds, self.seed) if self.folds else [hold_out(y, HELD_OUT, self.seed)]
        if train.large:  # a file is read faster from its beginning to its end
            parts = [(fitting.sort().values, held_out.sort().values) for fitting, held_out in parts]
        for fitting, held_out in parts:
            tried = fit_lbfgs(_some(x, fitting), y[fitting], classes, self.penalties)
            merits += _merits(tried, _some(x, held_out), y[held_out])
        chosen = _best(merits)
        head = fit_lbfgs(x, y, classes, [self.penalties[chosen]], start=tried.only(chosen))
        return accuracies(head, others, test.known_labels) | {"linear_penalty": float(self.penalties[chosen])}

    def _of_targets(self, x: Tensor, targets: Targets, others: Tensor, truth: Targets) -> Figures:
        """The same of several labels or numbers: fitted on ``x``, measured on ``others``."""
        alike = torch.zeros(len(x), dtype=torch.int64)  # no classes to spread over the parts
        parts = folds(alike, self.folds, self.seed) if self.folds else [hold_out(alike, HELD_OUT, self.seed)]
        lost = torch.zeros(len(self.penalties), dtype=torch.float64, device=x.device)
        for fitting, held_out in parts:
            said = linear_outputs(x[fitting], targets[fitting], self.penalties, x[held_out])
            lost += misfit(said, targets[held_out])
        penalty = float(self.penalties[int(lost.argmin())])
        found = target_figures(linear_outputs(x, targets, [penalty], others)[0], truth)
        return {f"linear_{name}": value for name, value in found.items()} | {"linear_penalty": penalty}


@takes(
    learning_rates=above(0), weight_decays=at_least(0), epochs=whole(1), batch_size=whole(1), momentum=at_least(0),
    seed=whole(0),
)  # fmt: skip
@dataclass(frozen=True)
class SGDProbe:
    """Linear heads trained by SGD with momentum on cached features, a grid of rates and decays as one batched head.

    Each head (its own learning rate and weight decay) sees the same batches; the rate falls to 0 along a cosine. The
    best on held-out training images is trained again on all of them.

    Attributes:
        learning_rates, weight_decays: the grid, crossed, for features centred and scaled to unit average variance.
        seed: of the held-out split and the order of the images.
    """

    learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    weight_decays: Sequence[float] = (0.0, 1e-5, 1e-4)
    epochs: int = 30
    batch_size: int = 256
    momentum: float = 0.9
    seed: int = 0
    device: str | None = None
    needs_labels = True

    @property
    def protocol(self) -> str:
        return (
            f"linear probe: SGD, {self.epochs} epochs, batch {self.batch_size}, on frozen un-augmented features; "
            f"learning rate out of {len(self.learning_rates)} and weight decay out of {len(self.weight_decays)} chosen "
            f"on {HELD_OUT:.0%} of the training images"
        )

    def __call__(self, train: Features, test: Features) -> dict[str, float]:
        train, test = (part.to(self.device) for part in checked(train, test))
        standardise = Standardise.of(train.x)
        x, y, classes = standardise(train.x), train.known_labels, train.classes
        fitting, held_out = hold_out(y, HELD_OUT, self.seed)
        grid = [(rate, decay) for rate in self.learning_rates for decay in self.weight_decays]
        tried = self._fit(x[fitting], y[fitting], classes, grid)
        rate, decay = grid[_best(_merits(tried, x[held_out], y[held_out]))]
        head = self._fit(x, y, classes, [(rate, decay)])
        chosen = {"linear_learning_rate": float(rate), "linear_weight_decay": float(decay)}
        return accuracies(head, standardise(test.x), test.known_labels) | chosen

    def _fit(self, x: Tensor, y: Tensor, classes: int, grid: Sequence[tuple[float, float]]) -> Linear:
        rates, decays = zip(*grid, strict=True)
        return fit_sgd(
            x,
            y,
            classes,
            rates,
            decays,
            epochs=self.epochs,
            batch_size=self.batch_size,
            momentum=self.momentum,
            seed=self.seed,
        )


@takes(shots=whole(1), draws=whole(1), penalty=at_least(0), seed=whole(0))
@dataclass(frozen=True)
class FewShot:
    """Logistic regression on ``k`` labelled images per class, drawn several times: mean and standard deviation.

    With so few labels nothing can be held out: the penalty is fixed.

    Attributes:
        shots: labelled images per class. None: 1, 5 and 20, those that some class cannot give left out, as the names of
            the results show. Shots given explicitly that a class cannot give are an error.
        draws: independent draws; draw ``i`` depends on ``seed + i`` and the labels only, so that two backbones are
            compared on the same images.
        penalty: lambda, see `LinearProbe`.
    """

    shots: Sequence[int] | None = None
    draws: int = 5
    penalty: float = 1e-2
    seed: int = 0
    device: str | None = None
    needs_labels = True

    @property
    def protocol(self) -> str:
        shots = "/".join(map(str, self.shots or STANDARD_SHOTS))
        return (
            f"logistic regression (L-BFGS, L2 {self.penalty:g}) on {shots} labelled training images per class, frozen "
            f"un-augmented features, mean and std of {self.draws} draws, whole test set"
        )

    def __call__(self, train: Features, test: Features) -> dict[str, Any]:
        """``{"few_shot": {"<shots>": {"mean", "std"}}}``; std is the population's (divided by the number of draws)."""
        train, test = (part.to(self.device) for part in checked(train, test))
        results = {}
        smallest = int(train.known_labels.unique(return_counts=True)[1].min())
        for shots in self.shots or [n for n in STANDARD_SHOTS if n <= smallest]:
            scores = torch.tensor([self._draw(train, test, shots, self.seed + draw) for draw in range(self.draws)])
            results[str(shots)] = {"mean": float(scores.mean()), "std": float(scores.std(correction=0))}
        return {"few_shot": results}

    def _draw(self, train: Features, test: Features, shots: int, seed: int) -> float:
        return self.fit(train.take(per_class(train.known_labels, shots, seed)), test)["linear_top1"]

    def fit(self, few: Features, test: Features) -> dict[str, float]:
        """`accuracies` on ``test`` of the regression on all of ``few``."""
        few, test = checked(few, test)
        standardise = Standardise.of(few.x)
        head = fit_lbfgs(standardise(few.x), few.known_labels, few.classes, [self.penalty])
        return accuracies(head, standardise(test.x), test.known_labels)


@dataclass(frozen=True)
class Standardise:
    """Centre, and divide by one number: geometry is kept, penalties and rates mean the same for every backbone."""

    mean: Tensor  # [D]
    scale: Tensor  # scalar

    @classmethod
    def of(cls, x: Tensor) -> Standardise:
        if x.dtype == torch.float16:  # of very many images, which half precision cannot sum
            mean = (total(part.sum(dim=0) for part in blocks(x)) / len(x)).float()
            spread = (total((part - mean).square().mean(dim=1).sum() for part in blocks(x)) / len(x)).sqrt().float()
            return cls(mean, spread.where(spread > 0, torch.ones_like(spread)))
        mean = x.mean(dim=0)
        spread = (x - mean).square().mean().sqrt()
        return cls(mean, spread.where(spread > 0, torch.ones_like(spread)))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out (int64): ``share`` of each class, at least one where it has two.

    When no class has enough images for that, all rows are in both parts.
    """
    order = _shuffled_by_class(labels, seed)
    grouped = labels.cpu()[order]
    place = _place_in_class(grouped)
    size = torch.bincount(grouped)[grouped]
    held = place < torch.minimum((size * share).long().clamp(min=1), size - 1)
    if not bool(held.any()):
        return order.to(labels.device), order.to(labels.device)
    return order[~held].to(labels.device), order[held].to(labels.device)


def folds(labels: Tensor, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """``n`` pairs of rows to fit on and rows held out (int64), each class spread evenly; every row is held out once."""
    order = _shuffled_by_class(labels, seed)
    fold = _place_in_class(labels.cpu()[order]) % n
    return [(order[fold != i].to(labels.device), order[fold == i].to(labels.device)) for i in range(n)]


def per_class(labels: Tensor, n: int, seed: int) -> Tensor:
    """``n`` random rows of every class (int64). UserError where a class has fewer."""
    order = _shuffled_by_class(labels, seed)
    grouped = labels.cpu()[order]
    sizes = torch.bincount(grouped)
    fewest = int(sizes[sizes > 0].min())
    if fewest < n:
        raise UserError(
            f"{n} labels per class were asked for, and the smallest class has {fewest} training images: ask for fewer."
        )
    return order[_place_in_class(grouped) < n].to(labels.device)


def _some(x: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """Rows of features, in memory or in a file."""
    return x[index] if isinstance(x, Tensor) else x.take(index)


def accuracies(head: Linear, x: Tensor | Rows, labels: Tensor) -> dict[str, float]:
    """``linear_top1``, and ``linear_top5`` with more than five classes, of a single head; see `balanced`."""
    scores = torch.cat([head(part)[:, 0] for part in x.split(BLOCK_ROWS)])
    figures = top_accuracies(scores, labels) | balanced(scores.argmax(1) == labels, labels)
    return {f"linear_{name}": value for name, value in figures.items()}


def top_accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``top1``, and ``top5`` with more than five classes, of ``[N, C]``."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    results = {"top1": float(hits[:, 0].double().mean())}
    if logits.shape[1] > 5:
        results["top5"] = float(hits.any(dim=1).double().mean())
    return results


def _merits(heads: Linear, x: Tensor | Rows, labels: Tensor) -> Tensor:
    """Number of correct rows and minus the summed loss, ``[H, 2]`` float64."""
    total = torch.zeros(len(heads.weight), 2, dtype=torch.float64, device=x.device)
    rows = max(1, BLOCK // heads.bias.numel())
    for part, y in zip(x.split(rows), labels.split(rows), strict=True):
        log_p = heads(part).log_softmax(dim=2)  # [rows, H, C]
        total[:, 0] += (log_p.argmax(dim=2) == y[:, None]).sum(dim=0)
        total[:, 1] += log_p.gather(2, y[:, None, None].expand(-1, log_p.shape[1], 1)).double().sum(dim=(0, 2))
    return total


def _best(merits: Tensor) -> int:
    """The head with the most correct, among equals the one with the smaller loss."""
    each = [tuple(row) for row in merits.tolist()]
    return max(range(len(each)), key=each.__getitem__)


def _shuffled_by_class(labels: Tensor, seed: int) -> Tensor:
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return shuffled[labels.cpu()[shuffled].argsort(stable=True)]


def _place_in_class(grouped: Tensor) -> Tensor:
    """Position of each row inside its run of equal labels."""
    sizes = torch.bincount(grouped)
    return torch.arange(len(grouped)) - (sizes.cumsum(0) - sizes)[grouped]
