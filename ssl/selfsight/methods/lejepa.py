"""LeJEPA: views of an image agree, and embeddings as a whole look like a standard Gaussian.

The second half replaces everything that other methods do against collapse: random directions are drawn at each step,
and along each of them a test of normality (Epps and Pulley's, as SIGReg) says by how much the batch departs. No
teacher, no predictor, no stopped gradient, one number to tune.

    Balestriero, LeCun: LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics. 2025,
    arXiv:2511.08544. Code: galilai-group/lejepa (SIGReg and MINIMAL.md).

SIGReg and the loss of equal views follow the code. With small views the mean is that of the global ones, as the paper
says; the authors' program for that is not released. Deviations: SIGReg in float32; directions follow from the step and
are the same on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.lejepa import lejepa, random_directions
from selfsight.methods.base import Method
from selfsight.nn.collapse import embedding_std
from selfsight.nn.heads import mlp
from selfsight.nn.matryoshka import PrefixLinear
from selfsight.nn.multicrop import multi_crop
from selfsight.validation import above, takes, whole


@takes(embedding_dim=whole(1), projector=whole(1), slices=whole(1), t_max=above(0), points=whole(3), n_global=whole(1))
class LeJEPA(Method):
    """Latent-Euclidean joint embedding: views agree, and their embeddings follow a Gaussian.

    Args:
        backbone: network to be trained.
        embedding_dim: width of a linear layer between backbone and projector; None leaves it out.
        projector: widths of the projector's layers, the last that of the embeddings, which may be small.
        lambd: weight of SIGReg; agreement has ``1 - lambd``.
        slices: K, random directions a step.
        t_max: end of the integral, see `selfsight.losses.lejepa.epps_pulley`.
        points: where it is evaluated.
        n_global: views whose mean the others are compared with, the first ones; None: all.
    """

    n_views = (2, None)
    decay = "all"
    across_images = "the embeddings of a batch are compared with a Gaussian"
    decay_places = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        embedding_dim: int | None = 512,
        projector: Sequence[int] = (2048, 2048, 64),
        lambd: float = 0.05,
        slices: int = 1024,
        t_max: float = 3.0,
        points: int = 17,
        n_global: int | None = 2,
    ) -> None:
        super().__init__(backbone)
        if not 0 <= lambd <= 1:
            raise UserError(f"LeJEPA's lambd is {lambd}; it is the share of SIGReg in the loss, from 0 to 1.")
        width: int = backbone.num_features  # type: ignore[assignment]
        self.embedding = nn.Identity() if embedding_dim is None else PrefixLinear(width, embedding_dim)
        direct = embedding_dim is None
        self.projector = mlp([embedding_dim or width, *projector], norm=nn.BatchNorm1d, of_features=direct)
        self.lambd, self.slices, self.n_global = lambd, slices, n_global
        self.t_max, self.points = t_max, points

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        V = len(batch.views)
        z = self.projector(self.embedding(multi_crop(self.backbone, batch.views))).unflatten(0, (V, -1))  # [V, B, D]
        A = self.directions(z)  # [D, K]
        terms = lejepa(z, A, lambd=self.lambd, n_global=self.n_global, t_max=self.t_max, points=self.points)
        found = {"invariance": terms.invariance, "sigreg": terms.sigreg, "embedding_scale": z.square().mean()}
        spread = embedding_std(z[0])  # a point need not be zero
        return {"loss": terms.loss, **{name: value.detach() for name, value in found.items()}, "embedding_std": spread}

    @torch.no_grad()
    def directions(self, z: Tensor) -> Tensor:
        """This step's random directions, for embeddings ``[..., D]``."""
        return random_directions(self.step, z.shape[-1], self.slices).to(z, non_blocking=True)
