"""SimSiam: two views, one network, a predictor, and no gradient on one side.

The prediction from one view has to point where the projection of the other view does, which is taken as given. Without
negatives, without a moving average: the missing gradient alone keeps a constant from being learned.

    Chen, He: Exploring Simple Siamese Representation Learning. CVPR 2021, arXiv:2011.10566. Code:
    facebookresearch/simsiam.

Follows the code: the last BatchNorm of the projector has no scale and shift; the bias before it, which BatchNorm takes
out again, stays at its first value; weight decay falls on every trained parameter; the predictor's learning rate does
not decay (``constant_predictor_lr``, the last row of the paper's table 1).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.simsiam import simsiam
from selfsight.methods.base import Method
from selfsight.nn.collapse import embedding_std, refuse_frozen
from selfsight.nn.heads import batch_norm_without_affine, mlp
from selfsight.optim.groups import ParamGroup, all_parameters
from selfsight.validation import SWITCH, takes, whole


@takes(
    dim=whole(1),
    projector_layers=whole(1),
    projector_dim=whole(1),
    predictor_dim=whole(1),
    constant_predictor_lr=SWITCH,
)
class SimSiam(Method):
    """Simple Siamese learning: predict the projection of the other view, which gets no gradient.

    Args:
        backbone: network to be trained.
        dim: D of projections and predictions.
        projector_layers: linear layers of the projector; 3, and 2 on CIFAR.
        projector_dim: width of its hidden layers; None takes that of the backbone.
        predictor_dim: width of the predictor's hidden layer, a quarter of D in the paper.
        constant_predictor_lr: the predictor's learning rate stays at its peak.
    """

    n_views = (2, 2)
    decay = "all"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 2048,
        projector_layers: int = 3,
        projector_dim: int | None = None,
        predictor_dim: int = 512,
        constant_predictor_lr: bool = True,
    ) -> None:
        super().__init__(backbone)
        refuse_frozen(backbone, "SimSiam")
        width: int = backbone.num_features  # type: ignore[assignment]
        hidden = [projector_dim or width] * (projector_layers - 1)
        self.projector = mlp(
            [width, *hidden, dim],
            norm=nn.BatchNorm1d,
            last_norm=batch_norm_without_affine,
            bias=False,
            of_features=True,
        )
        self.projector[-2].bias.requires_grad_(False)
        self.predictor = mlp([dim, predictor_dim, dim], norm=nn.BatchNorm1d, bias=False)
        self.constant_predictor_lr = constant_predictor_lr

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        z = [self.projector(self.backbone(v)) for v in batch.views]  # [B, D] each: BatchNorm sees a view by itself
        p = [self.predictor(z_v) for z_v in z]  # [B, D] each
        loss = simsiam(p[0], p[1], z[0], z[1])
        return {"loss": loss, "projection_std": embedding_std(z[0])}

    def chance_loss(self) -> float:
        """Predictions at right angles to their targets."""
        return 0.0

    def param_groups(self) -> list[ParamGroup]:
        """All parameters are decayed; the predictor's are a group of their own where their learning rate is."""
        if not self.constant_predictor_lr:
            return super().param_groups()
        return [
            *all_parameters(nn.ModuleList([self.backbone, self.projector])),
            *({**group, "constant_lr": True} for group in all_parameters(self.predictor)),
        ]
