"""k nearest neighbours on frozen features: cosine similarity s, each neighbour votes with weight exp(s / T).

The weighting is that of Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance Discrimination* (2018),
section 3.4. One exact search serves every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.contracts import Targets
from selfsight.errors import UserError
from selfsight.evaluation.base import Figures
from selfsight.evaluation.features import Features, checked
from selfsight.evaluation.probes.balance import balanced
from selfsight.evaluation.probes.dims import with_dims
from selfsight.evaluation.probes.inverted_lists import InvertedLists
from selfsight.evaluation.probes.targets import TargetFigures, target_figures, votes
from selfsight.evaluation.rows import BLOCK_ROWS, Rows
from selfsight.nn.sphere import directions
from selfsight.validation import SWITCH, above, one_of, takes, whole

STANDARD_K = (1, 5, 20, 200)
REPORTED_K = 20
VOTE_BLOCK = 5_000_000  # votes (images x classes) kept at a time
PAIR_BLOCK = 2**18  # numbers of rows compared exactly at a time: few enough for a core's cache
BACKENDS = ("auto", "torch", "faiss")
# What a product of float32 matrices may be wrong by, for unit rows; neighbours nearer to each other are put in order by
# their exact similarity.
NEAR = 2.0**-18
SPARE = 16  # neighbours sought beyond k, so that those as near as the k-th are mostly among them


#: what is searched: unit rows ``[N, D]``
Bank = Tensor | Rows
#: images whose neighbours are sought at a time, and those whose exact ones are compared with what was found
QUERIES, RECALLED = 16_384, 256


@takes(
    k=whole(1), temperature=above(0), backend=one_of(*BACKENDS), bf16=SWITCH, approximate_from=whole(1), dims=whole(1)
)
@dataclass(frozen=True)
class KNN:
    """Weighted cosine kNN.

    ``knn_top1`` (and ``knn_top5`` with more than five classes) is the accuracy at k = 20, or at the largest k below it:
    a fixed choice, since taking the best k would be choosing on the test set. ``knn_k<k>_top1`` gives every k. Where
    classes are unequal ``knn_balanced`` is the mean of their accuracies. Of images with several labels or numbers the
    weighted mean of the neighbours' is compared: ``knn_map`` and ``knn_f1``, or ``knn_r2``; see `probes.targets`.

    Attributes:
        k: numbers of neighbours. None: 1, 5, 20 and 200, those larger than the bank left out, as the names of
            the results show. A k given explicitly and larger than the bank is an error.
        temperature: T of the vote.
        backend: ``torch`` (on the device), ``faiss`` (on the CPU), or ``auto``: torch on a GPU, else faiss. Both search
            exactly and give the same answer; of equally near images the one that comes first in the bank is nearer.
        device: where to search; None: the GPU where there is one.
        bf16: similarities in bfloat16 (torch only): about twice as fast, up to 1 % of the predictions change.
        dims: numbers of first features to look at as well, ascending, see `probes.dims`; None: all features alone.
        approximate_from: images of the bank from which on the search is faiss' in inverted lists, which finds most of
            the neighbours; ``knn_search_recall`` is the share of the exact ones, of some images, that it found.
    """

    k: Sequence[int] | None = None
    temperature: float = 0.07
    backend: str = "auto"
    device: str | None = None
    bf16: bool = False
    approximate_from: int = 5_000_000
    dims: Sequence[int] | None = None
    needs_labels = True
    takes_targets = True

    @property
    def protocol(self) -> str:
        ks = "/".join(map(str, self.k or STANDARD_K))
        return (
            f"weighted kNN, cosine, exp(s/{self.temperature:g}), k {ks}, bank of all training images, no augmentation"
            + ("" if self.approximate_from > 10**6 else f"; {self._searched}")
        )

    @property
    def _searched(self) -> str:
        return f"approximate search from {self.approximate_from:,} images on"

    def protocol_of(self, found: Figures) -> str:
        """`protocol`, and how good the search was where it was none of all images."""
        recall = found.get("knn_search_recall")
        if recall is None:
            return self.protocol
        searched = f"{self._searched}, which found {recall:.1%} of the exact neighbours"
        return f"{self.protocol.removesuffix(f'; {self._searched}')}; {searched}"

    def __call__(self, train: Features, test: Features) -> Figures:
        if self.dims is not None:
            return with_dims(self, train, test)
        train, test = checked(train, test, blocks=True)
        ks = usable_k(self.k, len(train))
        train, test = train.to(self.device), test.to(self.device)
        reported = max((k for k in ks if k <= REPORTED_K), default=ks[0])
        bank = Rows(train.x, directions) if train.large else directions(train.x)
        approximate = len(bank) >= self.approximate_from
        lists = InvertedLists(bank) if approximate else None
        asked = test.x.split(QUERIES if train.large or test.large else len(test))
        found = [self._neighbours(directions(part.float()), bank, ks[-1], lists) for part in asked]
        similarity, index = (torch.cat(side) for side in zip(*found, strict=True))
        recall = {}
        if approximate:
            some = torch.linspace(0, len(test) - 1, min(RECALLED, len(test)), device=index.device).long()
            _, exact = neighbours(directions(test.x[some].float()), bank, reported, backend=self.backend)
            recall = {"knn_search_recall": _share((index[some, :, None] == exact[:, None]).any(dim=1))}
        return recall | self._figures(train, test, similarity, index, ks, reported)

    def _neighbours(self, queries: Tensor, bank: Bank, k: int, lists: InvertedLists | None) -> tuple[Tensor, Tensor]:
        if lists is None:
            return neighbours(queries, bank, k, backend=self.backend, bf16=self.bf16)
        return lists.neighbours(queries, k)

    def _figures(
        self, train: Features, test: Features, similarity: Tensor, index: Tensor, ks: Sequence[int], reported: int
    ) -> Figures:
        if train.targets is not None and test.targets is not None:
            found = target_figures_by_k(similarity, index, train.targets, test.targets, ks, self.temperature)
            named = {f"knn_k{k}_{name}": v for k in ks for name, v in found[k].items() if isinstance(v, float)}
            return {f"knn_{name}": value for name, value in found[reported].items()} | named
        voters = train.known_labels[index]
        ranks = true_class_ranks(similarity, voters, test.known_labels, ks, self.temperature, train.classes)
        results: dict[str, float] = {}
        for k, rank in ranks.items():
            results[f"knn_k{k}_top1"] = _share(rank < 1)
            if train.classes > 5:
                results[f"knn_k{k}_top5"] = _share(rank < 5)
        tops = ("top1", "top5") if train.classes > 5 else ("top1",)
        even = balanced(ranks[reported] < 1, test.known_labels)
        return {
            **{f"knn_{top}": results[f"knn_k{reported}_{top}"] for top in tops},
            **{f"knn_{name}": value for name, value in even.items()},
            **results,
        }


def usable_k(k: Sequence[int] | None, bank: int) -> list[int]:
    """The k to report, ascending. UserError when one was asked for that the bank cannot serve."""
    if k is None:
        return [k for k in STANDARD_K if k <= bank]
    if max(k) > bank:
        raise UserError(
            f"k = {max(k)} neighbours were asked for, and the bank holds {bank} images: take k up to {bank}."
        )
    return sorted({int(each) for each in k})


def neighbours(
    queries: Tensor, bank: Bank, k: int, *, backend: str = "auto", bf16: bool = False, chunk_bytes: int = 100_000_000
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest inner product, exactly; of equal ones those with the smallest index.

    Args:
        queries: ``[M, D]`` float32. bank: ``[N, D]`` float32, on the same device. Rows of length 1. A bank of `Rows` is
            searched block by block, with the same result.
        bf16: bfloat16 products, which is what similarities and their order then are.
        chunk_bytes: the block of similarities kept at a time.

    Returns:
        similarity ``[M, k]``, falling, and index ``[M, k]`` into the bank.
    """
    sought = min(k if bf16 else k + SPARE, len(bank))
    similarity, index = _search(queries, bank, sought, backend, bf16, chunk_bytes)
    if not bf16:
        incomplete = (similarity[:, k - 1] - similarity[:, -1] < NEAR) & (sought < len(bank))
        similarity, index = _in_exact_order(queries, bank, similarity, index)
        for rows in incomplete.nonzero()[:, 0].split(max(1, chunk_bytes // (8 * len(bank)))):
            similarity[rows, :k], index[rows, :k] = _first_of_all(queries[rows], bank, k)
    return similarity[:, :k], index[:, :k]


def _search(queries: Tensor, bank: Bank, k: int, backend: str, bf16: bool, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """`neighbours` up to what the products are wrong by."""
    if isinstance(bank, Rows):
        return _merged(queries, bank, k, backend, bf16, chunk_bytes)
    if backend == "auto":
        backend = "faiss" if bank.device.type == "cpu" and not bf16 else "torch"
    if backend == "faiss":
        import faiss

        found, places = faiss.knn(
            queries.cpu().contiguous().numpy(), bank.cpu().contiguous().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(found).to(bank.device), torch.from_numpy(places).to(bank.device)
    if bf16:
        queries, bank = queries.bfloat16(), bank.bfloat16()
    similarity = torch.empty(len(queries), k, device=bank.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    rows = max(1, chunk_bytes // (bank.element_size() * len(bank)))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        product = queries[block] @ bank.T  # [rows, N]
        values, columns = product.topk(k, dim=1, sorted=False)
        values, order = values.float().sort(dim=1, descending=True, stable=True)  # sorting k beats topk's sorting
        similarity[block], index[block] = values, columns.gather(1, order)
    return similarity, index


def _merged(queries: Tensor, bank: Rows, k: int, backend: str, bf16: bool, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """`_search` of one block after the other: the nearest of each and of those found before, the earlier ones first."""
    similarity = torch.empty(len(queries), 0, device=queries.device)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for block in bank.split(BLOCK_ROWS):
        found, places = _search(queries, block, min(k, len(block)), backend, bf16, chunk_bytes)
        similarity, index = torch.cat([similarity, found], dim=1), torch.cat([index, places + start], dim=1)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        similarity, index = similarity[:, :k].contiguous(), index.gather(1, order[:, :k])
        start += len(block)
    return similarity, index


def _in_exact_order(queries: Tensor, bank: Bank, similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours that are nearly as near as the next, compared exactly; equal ones by index."""
    close = similarity[:, :-1] - similarity[:, 1:] < NEAR
    edge = close.new_zeros(len(close), 1)
    after = torch.cat([edge, close], dim=1)  # nearly as near as the one before it
    query, place = (torch.cat([close, edge], dim=1) | after).nonzero(as_tuple=True)
    if not len(query):
        return similarity, index
    row, run = index[query, place], (~after[query, place]).cumsum(dim=0)
    parts = (part.split(max(1, PAIR_BLOCK // bank.shape[1])) for part in (query, row))
    exact = torch.cat([_exact(queries[q], bank[r]) for q, r in zip(*parts, strict=True)])
    order = row.argsort()  # the least important key first: index, similarity, run
    order = order[exact[order].argsort(descending=True, stable=True)]
    order = order[run[order].argsort(stable=True)]
    similarity, index = similarity.clone(), index.clone()
    similarity[query, place], index[query, place] = exact[order].float(), row[order]
    return similarity, index


def _first_of_all(queries: Tensor, bank: Bank, k: int) -> tuple[Tensor, Tensor]:
    """`neighbours` by exact products with the whole bank."""
    wide = _rounded(queries).double()
    product = torch.cat([wide @ _rounded(part).double().T for part in bank.split(10_000)], dim=1)  # [r, N]
    values, index = product.topk(k, dim=1, sorted=False)
    kth = values.amin(dim=1, keepdim=True)
    tied = ((product >= kth).sum(dim=1) > k).nonzero()[:, 0]  # rows beyond the k are as near as the k-th
    part, missing = product[tied], k - (values[tied] > kth[tied]).sum(dim=1, keepdim=True)
    equal = part == kth[tied]
    chosen = (part > kth[tied]) | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))
    index[tied] = chosen.nonzero()[:, 1].view(len(tied), k)
    index = index.sort(dim=1).values
    values, order = product.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values.float(), index.gather(1, order)


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows ``[N, D]`` in float64, ``[N]``."""
    return (_rounded(x).double() * _rounded(y).double()).sum(dim=1)


def _rounded(x: Tensor) -> Tensor:
    """Multiples of 2^-24: inner products of unit rows of such are exact in float64, whatever the order of the sums.

    So copies of an image are equally near, on every device and wherever they stand in the bank.
    """
    return (x * 2.0**24).round_().mul_(2.0**-24)


def other_neighbours(queries: Tensor, bank: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `neighbours` of queries that are in the bank themselves: each with its own row left out, and no other.

    Exact copies of a query are neighbours like any other, whatever the order in which a search returns equals.

    Args:
        own: ``[M]``, the row of each query in the bank, -1 for one that is not in it; None: row i is query i.
    """
    similarity, index = neighbours(queries, bank, k + 1)
    if own is None:
        own = torch.arange(len(index), device=index.device)
    kept = index != own[:, None]
    kept[kept.all(dim=1), -1] = False  # not in the bank, or behind k copies of itself: the last one is too many
    return similarity[kept].view(len(index), k), index[kept].view(len(index), k)


def true_class_ranks(
    similarity: Tensor, voters: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> dict[int, Tensor]:
    """Rank of the true class in the vote, 0 the winner, for each k.

    A class nobody voted for ranks last, so that top-5 is not won by counting; equal votes go to the smaller label.

    Args:
        similarity, voters: ``[M, K]`` similarities, falling, and labels of the neighbours, K at least the largest k.
        labels: ``[M]`` true labels; one at or beyond ``classes`` is never found.

    Returns:
        ``[M]`` int64 by k.
    """
    rows = max(1, VOTE_BLOCK // classes)
    if len(labels) > rows:
        blocks = [
            true_class_ranks(
                similarity[i : i + rows], voters[i : i + rows], labels[i : i + rows], ks, temperature, classes
            )
            for i in range(0, len(labels), rows)
        ]
        return {k: torch.cat([block[k] for block in blocks]) for k in ks}
    # relative to the nearest neighbour: exp(1 / T) overflows float32 below T = 0.012, and the common factor cancels
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(labels), classes, dtype=weight.dtype, device=weight.device)
    smaller = torch.arange(classes, device=labels.device) < labels[:, None]  # [M, C]
    known = (labels < classes)[:, None]
    ranks: dict[int, Tensor] = {}
    start = 0
    for k in ks:
        votes.scatter_add_(1, voters[:, start:k], weight[:, start:k])
        own = votes.gather(1, labels[:, None].clamp(max=classes - 1)).where(known, 0.0)  # [M, 1]
        rank = ((votes > own) | ((votes == own) & smaller)).sum(dim=1)
        ranks[k] = rank.where(own[:, 0] > 0, torch.tensor(classes, device=rank.device))
        start = k
    return ranks


def target_figures_by_k(
    similarity: Tensor, index: Tensor, bank: Targets, truth: Targets, ks: Sequence[int], temperature: float
) -> dict[int, TargetFigures]:
    """`target_figures` of the votes of the first k neighbours, by k.

    Args:
        similarity, index: ``[M, K]``, as `neighbours` gives them.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    rows = max(1, VOTE_BLOCK // (index.shape[1] * len(bank.names)))
    said = {
        k: torch.cat([
            votes(w[:, :k], bank.values[near[:, :k]])
            for w, near in zip(weight.split(rows), index.split(rows), strict=True)
        ])
        for k in ks
    }  # fmt: skip
    return {k: target_figures(each, truth) for k, each in said.items()}


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
