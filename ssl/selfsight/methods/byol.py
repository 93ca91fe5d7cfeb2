"""BYOL: an image is told by what a slow copy of the network says of its other view.

The online network has a predictor on top; it has to predict the projection that the target network, a moving average of
the online one, gives to the other view. Nothing pushes images apart: that a constant is not learned is owed to the
predictor and to the target's slowness.

    Grill, Strub, Altché, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar, Piot,
    Kavukcuoglu, Munos, Valko: Bootstrap Your Own Latent. NeurIPS 2020, arXiv:2006.07733. Code:
    google-deepmind/deepmind-research, byol.

Follows the code: both directions of the loss are added, each view passes the networks by itself, and the target's
BatchNorm gathers statistics of its own. Deviations: the target begins as a copy of the online network (the authors draw
it anew and found no difference); it holds no predictor, which the authors average and never use.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.byol import byol
from selfsight.methods.base import Method
from selfsight.methods.online_probe import OnlineProbe
from selfsight.nn.collapse import embedding_std, refuse_frozen
from selfsight.nn.ema import EMATeacher
from selfsight.nn.heads import mlp
from selfsight.validation import takes, whole


@takes(hidden_dim=whole(1), dim=whole(1), predictor_dim=whole(1), online_classes=whole(0))
class BYOL(Method):
    """Bootstrap Your Own Latent: predict the projection of the other view by a moving average of the network.

    The average's momentum tau is the scheduled value ``teacher_momentum``.

    Args:
        backbone: network to be trained.
        hidden_dim: width of the projector's hidden layer.
        dim: D of projections and predictions.
        predictor_dim: width of the predictor's hidden layer; None: that of the projector's.
        online_classes: above 0 trains a linear classifier of that many classes on the detached features of the first
            view along the way, with the same optimiser (the authors' code). The backbone does not notice it.
    """

    n_views = (2, 2)
    schedules = ("teacher_momentum",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 4096,
        dim: int = 256,
        predictor_dim: int | None = None,
        online_classes: int = 0,
    ) -> None:
        super().__init__(backbone)
        refuse_frozen(backbone, "BYOL")
        width: int = backbone.num_features  # type: ignore[assignment]
        self.projector = mlp([width, hidden_dim, dim], norm=nn.BatchNorm1d, last_bias=False, of_features=True)  # g
        self.predictor = mlp([dim, predictor_dim or hidden_dim, dim], norm=nn.BatchNorm1d, last_bias=False)  # q
        self.target = EMATeacher(self.online, buffers="keep")
        self.classifier = OnlineProbe(width, online_classes, decay=0.0) if online_classes else None

    @property
    def online(self) -> nn.Sequential:
        """Backbone and projector, the part the target is an average of."""
        return nn.Sequential(self.backbone, self.projector)

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        h = [self.backbone(v) for v in batch.views]  # [B, F] each: BatchNorm sees a view by itself
        p = [self.predictor(self.projector(h_v)) for h_v in h]  # [B, D] each
        with torch.no_grad():
            z = [self.target(v) for v in batch.views]  # [B, D] each
        found = {"loss": byol(p[0], p[1], z[0], z[1]), "projection_std": embedding_std(z[0])}
        return found if self.classifier is None else self.classifier.add_to(found, h[0], batch.labels)

    def after_step(self) -> None:
        self.target.update(self.online, self.scheduled["teacher_momentum"])

    def chance_loss(self) -> float:
        """Predictions at right angles to their targets."""
        return 4.0
