"""Retrieval with embeddings that can be cut: a long list by few numbers, shorter ones by more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError
from selfsight.evaluation.probes.knn import neighbours


@torch.no_grad()
def funnel(
    queries: Tensor, bank: Tensor, *, first: int, dims: Sequence[int], shortlists: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Nearest rows by a short prefix, then their best by longer and longer ones (RAIVNLab/MRL, reranking.ipynb).

    Each prefix is normalised by itself. One pair of dims and shortlists is adaptive retrieval, several are a funnel.

    Args:
        queries: ``[M, D]``. bank: ``[N, D]``.
        first: numbers compared in the search. dims: numbers compared when a list is ranked again.
        shortlists: how many of the list are ranked, as many as dims, falling; the first is what the search returns.

    Returns:
        neighbours ``[M, shortlists[0]]`` of the search and the ranking ``[M, shortlists[-1]]``, best first.

    Raises:
        UserError: lists that do not match, grow, or are longer than the bank; more dims than there are.
    """
    falling = all(a >= b for a, b in itertools.pairwise(shortlists))
    if len(dims) != len(shortlists) or not dims or not falling or shortlists[0] > len(bank):
        raise UserError(
            f"A funnel was asked for with dims {list(dims)}, shortlists {list(shortlists)} and a bank of {len(bank)}; "
            "give one shortlist for each of dims, none longer than the one before it or than the bank."
        )
    if max(first, *dims) > bank.shape[1]:
        raise UserError(
            f"A funnel was asked for over {max(first, *dims)} numbers of embeddings that have {bank.shape[1]}."
        )
    q, b = F.normalize(queries[:, :first], dim=1), F.normalize(bank[:, :first], dim=1)
    _, found = neighbours(q, b, shortlists[0], backend="torch")
    ranked = found
    for dim, length in zip(dims, shortlists, strict=True):
        ranked = ranked[:, :length]
        candidates = F.normalize(bank[ranked, :dim], dim=-1)  # [M, length, dim]
        similarity = torch.einsum("md,mkd->mk", F.normalize(queries[:, :dim], dim=1), candidates)
        ranked = ranked.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
    return found, ranked
