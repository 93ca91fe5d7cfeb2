"""A step whose loss or gradient was no number, kept in a file from which it can be done again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfsight.contracts import Batch, SemiBatch
from selfsight.engine.checkpointing import Checkpoint, read_checkpoint, write_checkpoint
from selfsight.errors import UserError


@dataclass
class BrokenStep:
    """What a step is made of.

    Attributes:
        cause: what became no number, in words. loss: of its batch.
        epoch, step, batch: where it stands, from 0. seed: of the run; with these numbers all that is random follows.
        precision: as Lightning calls it.
        state: of the method as the batch met it, on the CPU.
        batches: views, indices and labels, of every process.
    """

    cause: str
    loss: float
    epoch: int
    step: int
    batch: int
    seed: int
    precision: str
    state: dict[str, Tensor]
    batches: list[Batch | SemiBatch]

    def write_to(self, path: Path) -> None:
        """Write the file whole, or not at all.

        Raises:
            UserError: it cannot be written.
        """
        write_checkpoint({**vars(self), "batches": [asdict(batch) for batch in self.batches]}, path)

    @classmethod
    def read(cls, path: Path) -> BrokenStep:
        """
        Raises:
            UserError: the file is damaged, or one of something else.
        """
        content = read_checkpoint(path)
        try:
            return cls(**{**content, "batches": [_batch(fields) for fields in content["batches"]]})
        except (TypeError, KeyError):
            raise UserError(f"'{path}' cannot be read as a step that went wrong (it holds something else).") from None

    @property
    def whole(self) -> Batch | SemiBatch:
        """The batch of all processes, as one."""
        parts = self.batches
        if isinstance(parts[0], SemiBatch):
            both = [part for part in parts if isinstance(part, SemiBatch)]
            return SemiBatch(_joined([part.labelled for part in both]), _joined([part.unlabelled for part in both]))
        return _joined([part for part in parts if isinstance(part, Batch)])


def _batch(fields: Checkpoint) -> Batch | SemiBatch:
    if "labelled" in fields:
        return SemiBatch(Batch(**fields["labelled"]), Batch(**fields["unlabelled"]))
    return Batch(**fields)


def _joined(parts: list[Batch]) -> Batch:
    labels = [part.labels for part in parts if part.labels is not None]
    boxes = [part.boxes for part in parts if part.boxes is not None]
    return Batch(
        [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)],
        torch.cat([part.indices for part in parts]),
        torch.cat(labels) if labels else None,
        [torch.cat(of_view) for of_view in zip(*boxes, strict=True)] if boxes else None,
    )
