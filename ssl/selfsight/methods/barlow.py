"""Barlow Twins: what two views say in one dimension should agree, and different dimensions should say different things.

The embeddings of both views, each dimension normalised over the batch, give a matrix of correlations. Its diagonal is
drawn to one and everything else to zero.

    Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction. ICML 2021,
    arXiv:2103.03230. Code: facebookresearch/barlowtwins.

Follows the code: biases and normalisation have a learning rate of their own. Deviations: the loss is computed in
float32; correlations are taken over the images of all devices, as in the code, but their gradient does not shrink with
the number of devices (``official_gradient`` brings back the authors' factor 1/W, which the biases of the published run
were trained with: W was 16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.barlow import barlow_twins
from selfsight.methods.base import Method
from selfsight.nn.batchnorm import SharedBatchNorm1d
from selfsight.nn.distributed import world_size
from selfsight.nn.heads import mlp
from selfsight.nn.precision import float32
from selfsight.optim.groups import ParamGroup, split_no_decay
from selfsight.validation import SWITCH, at_least, takes, whole


@takes(projector=whole(1), lambd=at_least(0), bias_lr=at_least(0), official_gradient=SWITCH)
class BarlowTwins(Method):
    """Redundancy reduction: the correlations of two views' embeddings become the identity.

    Args:
        backbone: network to be trained.
        projector: widths of the projector's layers, the last that of the embeddings.
        lambd: weight of the correlations off the diagonal.
        bias_lr: learning rate of biases and normalisation as a multiple of the weights' (0.0048 to 0.2 in the paper).
        official_gradient: divide the gradient by the number of processes.
    """

    n_views = (2, 2)
    across_images = "correlations are those over the images of a batch"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projector: Sequence[int] = (8192, 8192, 8192),
        lambd: float = 0.0051,
        bias_lr: float = 0.024,
        official_gradient: bool = False,
    ) -> None:
        super().__init__(backbone)
        width: int = backbone.num_features  # type: ignore[assignment]
        self.projector = mlp([width, *projector], norm=nn.BatchNorm1d, bias=False, last_bias=False, of_features=True)
        self.bn = SharedBatchNorm1d(projector[-1], affine=False)
        self.lambd, self.bias_lr, self.official_gradient = lambd, bias_lr, official_gradient

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        z = [self.projector(self.backbone(v)) for v in batch.views]  # [B, D] each: BatchNorm sees a view by itself
        z1, z2 = (self.bn(float32(z_v)) for z_v in z)
        on_diagonal, off_diagonal, C = barlow_twins(z1, z2)
        loss = on_diagonal + self.lambd * off_diagonal
        if self.official_gradient:
            loss = scale_gradient(loss, 1 / world_size())
        C, D = C.detach(), len(C)
        correlations = {"agreement": C.diagonal().mean(), "redundancy": (off_diagonal.detach() / (D * (D - 1))).sqrt()}
        return {"loss": loss, **correlations}

    def chance_loss(self) -> float:
        """D: all embeddings are one, so that nothing correlates."""
        return float(self.bn.num_features)

    def param_groups(self) -> list[ParamGroup]:
        """Biases and normalisation: no decay, no adaptation, a learning rate of their own."""
        return [{**group, "lr_scale": self.bias_lr} if group["plain"] else group for group in split_no_decay(self)]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x`` itself, with ``scale`` times its gradient."""
    return x * scale + x.detach() * (1 - scale)
