"""VICReg: views agree, every dimension varies, no two dimensions say the same.

Three terms of the embeddings of a batch: the distance of the two views, a hinge that keeps the standard deviation of
every dimension above one, and the covariances between dimensions, which should be none. Collapse is forbidden in plain
words; there is no predictor, no average, no negative.

    Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning. ICLR 2022,
    arXiv:2105.04906. Code: facebookresearch/vicreg.

Follows the code: the variance term is halved, which the paper's equation does not do. Deviations: the loss is computed
in float32, the covariance divides by the images there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.vicreg import vicreg
from selfsight.methods.base import Method
from selfsight.nn.heads import mlp
from selfsight.validation import at_least, takes, whole


@takes(expander=whole(1), sim_coeff=at_least(0), std_coeff=at_least(0), cov_coeff=at_least(0))
class VICReg(Method):
    """Variance-invariance-covariance: views agree, and the embeddings of a batch spread along every axis alike.

    Args:
        backbone: network to be trained.
        expander: widths of the expander's layers, the last that of the embeddings.
        sim_coeff: weight of invariance, the paper's lambda.
        std_coeff: weight of variance, its mu.
        cov_coeff: weight of covariance, its nu.
    """

    n_views = (2, 2)
    across_images = "variances and covariances are those over the images of a batch"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        expander: Sequence[int] = (8192, 8192, 8192),
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
    ) -> None:
        super().__init__(backbone)
        width: int = backbone.num_features  # type: ignore[assignment]
        self.projector = mlp([width, *expander], norm=nn.BatchNorm1d, last_bias=False, of_features=True)
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x, y = (self.projector(self.backbone(v)) for v in batch.views)  # [B, D] each: BatchNorm sees a view by itself
        invariance, variance, covariance = vicreg(x, y)
        loss = self.sim_coeff * invariance + self.std_coeff * variance + self.cov_coeff * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def chance_loss(self) -> float:
        """All embeddings are one: no distance, no covariance, and 0.99 of every standard deviation missing."""
        return 0.99 * self.std_coeff
