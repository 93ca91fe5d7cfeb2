"""Is it collapsing? Figures of an embedding that need no labels, what is normal for each, an alarm with its remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.evaluation.features import Features, checked
from selfsight.evaluation.rows import blocks, total
from selfsight.nn.sphere import directions


@dataclass(frozen=True)
class Figure:
    """What a figure means, what is normal, and from where on something is wrong.

    Attributes:
        below, above: the alarm rings under or over this value (None: never).
        remedy: one sentence, with ``{value}`` for the value.
    """

    meaning: str
    normal: str
    remedy: str = ""
    below: float | None = None
    above: float | None = None

    def rings(self, value: float) -> bool:
        """Whether the value is out of bounds; one that is no number is, wherever there are bounds."""
        low, high = (
            self.below is not None and not value >= self.below,
            self.above is not None and not value <= self.above,
        )
        return low or high


FIGURES: Mapping[str, Figure] = {
    "feature_std": Figure(
        "standard deviation of the L2-normalised features over the images, averaged over dimensions, times sqrt(D)",
        "0 when every image gets the same feature, 1 on the whole sphere; 0.3 to 0.9 for trained backbones",
        "Collapse: all images get almost the same feature (spread {value:.3g}; 0 is one point, 1 the whole sphere): "
        "lower the learning rate, and check that the views are augmented and that something keeps features apart.",
        below=0.01,
    ),
    "rank": Figure(
        "effective rank (RankMe): over how many dimensions the features spread",
        "from 2 to 100 untrained, then rising; a twentieth to two thirds of the dimensions for trained backbones",
        "Dimensional collapse: the features of all images lie along one line (effective rank {value:.2f}): lower the "
        "learning rate, or train with more negatives or a larger batch.",
        below=1.5,
    ),
    "projection_std": Figure(
        "the same of the projections of a training batch: BYOL's and SimSiam's, and PixPro's over all pixels",
        "0.4 to 1; may dip to 0.1 in the first epochs",
        "Collapse: all images (PixPro: pixels) get almost the same projection (spread {value:.3g}; 0 is one point, 1 "
        "the whole sphere): lower the learning rate, or keep the method's own optimizer and heads.",
        below=0.05,
    ),
    "key_std": Figure(
        "the same of MoCo v3's keys",
        "0.4 to 1",
        "Collapse: all images get almost the same key (spread {value:.3g}; 0 is one point, 1 the whole sphere): lower "
        "the learning rate, or warm up for longer.",
        below=0.05,
    ),
    "embedding_std": Figure(
        "the same of the embeddings of a training batch: LeJEPA's and SupCon's",
        "0.4 to 1; SupCon's may dip to 0.1 in the first epochs",
        "Collapse: all images get almost the same embedding (spread {value:.3g}; 0 is one point, 1 the whole sphere): "
        "lower the learning rate, and for LeJEPA raise method.lambd.",
        below=0.01,
    ),
    "teacher_entropy": Figure(
        "mean entropy of what DINO's teacher says of an image, divided by ln K",
        "about 0.9 at first, then falling",
        "Collapse: the teacher is certain of one output whatever the image (entropy {value:.3g} of 1): warm it up with "
        "schedule.teacher_temperature, or lower the learning rate.",
        below=0.001,
    ),
    "embedding_scale": Figure(
        "mean square of LeJEPA's embeddings",
        "near 1, that of a standard Gaussian",
        "Collapse: LeJEPA's embeddings shrink to a point (mean square {value:.3g}; 1 is a standard Gaussian): raise "
        "method.lambd.",
        below=0.01,
    ),
    "rank_share": Figure(
        "effective rank divided by the number of dimensions, or of images where these are fewer",
        "0.05 to 0.7 for trained backbones; falling while training goes on is dimensional collapse",
    ),
    "code_entropy": Figure(
        "entropy of the average assignment to prototypes, divided by ln K",
        "above 0.9: the prototypes share the images evenly",
        "The prototypes share the images very unevenly (entropy {value:.2f} of 1): take fewer prototypes, or freeze "
        "them for longer.",
        below=0.5,
    ),
    "live_prototypes": Figure(
        "share of prototypes that get at least a tenth of their fair share of the images",
        "above 0.5, given more images than prototypes",
        "Only {value:.1%} of the prototypes get images: take fewer prototypes, a lower learning rate, or start the "
        "queue later.",
        below=0.1,
    ),
    "code_softness": Figure(
        "mean entropy of a single image's code, divided by ln K",
        "below 0.9: codes prefer some prototypes",
        "The codes say nothing (entropy {value:.3f} of 1 each): lower epsilon, or train with more images per step.",
        above=0.995,
    ),
    "mask_rate": Figure(
        "share of unlabelled images whose pseudo-label is confident enough to learn from",
        "near 0 at first, 0.5 to 0.95 later",
        "Hardly any pseudo-label is confident enough to learn from ({value:.2%}): train for longer, or lower the "
        "threshold.",
        below=0.0005,
    ),
    "alignment": Figure(
        "mean squared distance of the L2-normalised features of two views of an image (0 to 4)",
        "0.1 to 1; falls in training",
    ),
    "uniformity": Figure(
        "log of the mean of exp(-2 d^2) over pairs of images, d the distance of L2-normalised features",
        "0 when all coincide, about -4 on a whole sphere; -1 to -3.5 for trained backbones",
    ),
    "alpha_req": Figure(
        "exponent of the power law the covariance's eigenvalues follow",
        "near 1; far above, few directions carry everything",
    ),
    "lidar": Figure(
        "effective rank of what tells images apart, measured against the spread of their views",
        "higher is better; at most the number of dimensions",
    ),
    "view_knn_top1": Figure(
        "share of images whose one view finds the other as its nearest neighbour",
        "rises in training, towards 1 for methods that pull views together",
    ),
}


@dataclass(frozen=True)
class Diagnostics:
    """Feature spread, effective rank and eigenvalue decay of the test features. Needs no labels.

    Of a set without test images it is given the training features in their place.
    """

    needs_labels = False

    @property
    def protocol(self) -> str:
        return (
            "spread, effective rank (RankMe) and eigenvalue decay of frozen un-augmented test features (of training "
            "features where there is no test set)"
        )

    def __call__(self, train: Features, test: Features) -> dict[str, float]:
        """``feature_std``, ``rank``, ``rank_share`` (of the dimensions, or of the images if fewer), ``alpha_req``."""
        train, test = checked(train, test, labels=False, blocks=True)
        rank = rankme(test.x)
        return {
            "feature_std": feature_std(test.x),
            "rank": rank,
            "rank_share": rank / min(test.x.shape),
            "alpha_req": alpha_req(test.x),
        }


def judge(figures: Mapping[str, float]) -> str | None:
    """The first alarm among the figures, one sentence with its remedy, or None when all is well."""
    for name, figure in FIGURES.items():
        if name in figures and figure.rings(figures[name]):
            return figure.remedy.format(value=figures[name])
    return None


def judge_nothing(loss: float) -> str | None:
    """A sentence when the loss of a whole epoch is exactly 0: no step of it had a gradient."""
    if loss != 0:
        return None
    return (
        "The loss was 0 in every step of the epoch, so that nothing was learned: give a batch more images to compare "
        "(batch_size=), a weight that is 0 another value, or train until pseudo-labels are confident."
    )


def judge_mask(rate: float, behind: float) -> str | None:
    """A sentence when nearly every pseudo-label is taken in the first tenth of a training: then nothing is chosen.

    Args:
        rate: ``mask_rate`` of the epoch. behind: share of the training that is done with it.
    """
    if rate < 0.9995 or behind > 0.1:
        return None
    return (
        "Every pseudo-label counts as confident in the first tenth of the training, when the classifier cannot know "
        "much: raise the threshold, or see whether all images are given one class."
    )


def judge_loss(
    losses: Sequence[float], chance: float, behind: float = 0.0, tolerance: float = 0.01, patience: int = 3
) -> str | None:
    """A sentence when the last ``patience`` epochs' losses are the loss of guessing, or all so far are above it.

    Within ``tolerance``: a share of it, and as much of 1 where it is smaller, since SimSiam's is 0. Above it is where
    contrastive losses begin; it is told when half of the training is behind.

    Args:
        behind: share of the training that is done.
    """
    recent = losses[-patience:]
    if len(recent) < patience:
        return None
    near = tolerance * max(1, abs(chance))
    if all(abs(loss - chance) <= near for loss in recent):
        return (
            f"The loss sits at {chance:.2f}, which is guessing, for {patience} epochs: change the learning rate (often "
            "it is too high), warm up for longer, or lower the temperature."
        )
    if behind >= 0.5 and all(loss > chance + near for loss in losses):
        return (
            f"The loss is {losses[-1]:.2f} and was never below the {chance:.2f} of guessing: train for more steps "
            "(smaller batches, more epochs), with views that leave more in common, or with a lower learning rate."
        )
    return None


def feature_std(x: Tensor) -> float:
    """Standard deviation over the images of L2-normalised features ``[N, D]``, mean over dimensions, times sqrt(D).

    0 for one point, 1 for directions uniform on the sphere (Chen & He, *Exploring Simple Siamese Representation
    Learning*, section 4.1, compares it with 1 / sqrt(D)).
    """
    mean = total(directions(part).sum(dim=0) for part in blocks(x)) / len(x)
    squares = total((directions(part) - mean).square().sum(dim=0) for part in blocks(x))
    return float((squares / len(x)).sqrt().mean() * math.sqrt(x.shape[1]))


def rankme(x: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of ``[N, D]``: exp of the entropy of the singular values over their sum (Garrido et al. 2023)."""
    p = singular_values(x)
    total = p.sum()
    if not total > 0:
        return 0.0
    p = p / total + epsilon
    return float((-p * p.log()).sum().exp())


def alpha_req(x: Tensor) -> float:
    """alpha of  eigenvalue_i ~ i^(-alpha)  fitted to the covariance's spectrum in logs (Agrawal et al. 2022).

    Eigenvalues below 1e-9 of the largest are rounding and left out; nan with fewer than two left.
    """
    ev = singular_values(x, centred=True).square()
    ev = ev[ev > 1e-9 * ev[0]]
    if len(ev) < 2:
        return math.nan
    i = torch.arange(1, len(ev) + 1, dtype=ev.dtype, device=ev.device).log()
    centred = i - i.mean()
    return -float((centred * ev.log()).sum() / centred.square().sum())


def lidar(x: Tensor, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """Effective rank of what tells images apart, measured against how far their views scatter (Thilak et al. 2023).

    With S_b the covariance of the images' means and S_w the mean covariance of the views around them plus delta, it is
    exp of the entropy of the normalised eigenvalues of S_w^(-1/2) S_b S_w^(-1/2).

    Args:
        x: ``[n, q, D]``, q >= 2 views of n images.
    """
    x = x.double()
    n, q, width = x.shape
    if width > n * q:  # what lies outside the span of the views changes nothing: their coordinates in it are enough
        x = torch.linalg.qr(x.flatten(0, 1).T, mode="r").R.T.unflatten(0, (n, q))
        width = n * q
    means = x.mean(dim=1)  # [n, D]
    within = (x - means[:, None]).flatten(0, 1)
    scatter = within.T @ within / (n * (q - 1)) + delta * torch.eye(width, dtype=x.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(scatter)
    white = ((means - means.mean(dim=0)) @ vectors) * values.rsqrt()  # the eigenvalues' roots are its singular values
    ev = singular_values(white).square()
    if not ev.sum() > 0:
        return 0.0
    p = ev / ev.sum() + epsilon
    return float((-p * p.log()).sum().exp())


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of two views' L2-normalised features ``[N, D]`` (Wang & Isola 2020, alpha = 2)."""
    return float((directions(a) - directions(b)).square().sum(dim=1).mean())


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """log mean exp(-t d^2) over the pairs i < j of L2-normalised features ``[N, D]`` (Wang & Isola 2020)."""
    x = directions(x.double())
    n = len(x)
    if n < 2:
        return math.nan
    squared = (2 - 2 * (x @ x.T)).clamp(min=0)
    return float((-t * squared).exp().triu(diagonal=1).sum().log() - math.log(n * (n - 1) / 2))


def code_entropy(assignments: Tensor) -> float:
    """Entropy of the average of assignments ``[N, K]`` (rows sum to 1) over ln K: 1 when all are used alike."""
    p = assignments.double().mean(dim=0)
    return float(torch.special.entr(p).sum() / math.log(assignments.shape[1]))


def live_prototypes(assignments: Tensor) -> float:
    """Share of K prototypes that are the largest entry of ``[N, K]`` for at least a tenth of their fair share N / K."""
    n, k = assignments.shape
    counts = torch.bincount(assignments.argmax(dim=1), minlength=k)
    return float((counts >= 0.1 * n / k).double().mean())


def view_knn_top1(a: Tensor, b: Tensor) -> float:
    """Share of images whose view in ``a`` has, by cosine, its own other view as nearest among all of ``b``, ``[N, D]``.

    An image counts only if no other is as near: a collapsed embedding scores 0, guessing 1 / N.
    """
    similarity = directions(a.double()) @ directions(b.double()).T
    own = similarity.diagonal()[:, None] - 1e-9  # rounding must not make a tie a victory
    return float((similarity >= own).sum(dim=1).eq(1).double().mean())


def view_figures(a: Tensor, b: Tensor) -> dict[str, float]:
    """``alignment``, ``uniformity`` and ``view_knn_top1`` of the features ``[N, D]`` of two views of each image."""
    spread = (uniformity(a) + uniformity(b)) / 2
    return {"alignment": alignment(a, b), "uniformity": spread, "view_knn_top1": view_knn_top1(a, b)}


def singular_values(x: Tensor, *, centred: bool = False) -> Tensor:
    """Singular values of ``[N, D]``, falling, float64, by the smaller Gram matrix (to about 1e-8 of the largest).

    Args:
        centred: of the rows less their mean.
    """
    mean = total(part.sum(dim=0) for part in blocks(x)) / len(x) if centred else x.new_zeros(x.shape[1]).double()
    if x.shape[0] >= x.shape[1]:
        gram = total((part - mean).T @ (part - mean) for part in blocks(x))
    else:
        x = x.double() - mean
        gram = x @ x.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
