"""Neighbours in a bank so large that not all of it is looked at: faiss' inverted lists."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selfsight.evaluation.rows import BLOCK_ROWS, Rows

#: rows of each list that the centres are learned from, and lists that are looked at of every hundred, at least `LEAST`
LEARNED_FROM, OF_HUNDRED, LEAST = 64, 1, 8


class InvertedLists:
    """A bank of unit rows ``[N, D]``, sorted into about 4 sqrt(N) lists by the nearest of as many centres.

    Looked at are the lists whose centres are nearest to a query.
    """

    def __init__(self, bank: Tensor | Rows) -> None:
        import faiss

        width, count = bank.shape[1], len(bank)
        lists = max(1, min(count // 8, round(4 * math.sqrt(count))))
        self.device = bank.device
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.min_points_per_centroid = 1
        some = torch.linspace(0, count - 1, min(count, LEARNED_FROM * lists), device=bank.device).long()
        self.index.train(bank[some].cpu().contiguous().numpy())
        for part in bank.split(BLOCK_ROWS):
            self.index.add(part.cpu().contiguous().numpy())
        self.index.nprobe = max(LEAST, OF_HUNDRED * lists // 100)

    def neighbours(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `knn.neighbours`, most of them. Where fewer than k are found, the last one fills the places."""
        similarity, index = map(torch.from_numpy, self.index.search(queries.cpu().contiguous().numpy(), k))
        there = (index >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        places = torch.arange(k).expand_as(index).minimum(there - 1)
        return similarity.gather(1, places).to(self.device), index.gather(1, places).clamp(min=0).to(self.device)
