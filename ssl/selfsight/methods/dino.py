"""DINO: a network that learns from its own moving average, without labels.

Large and small crops of an image pass the student, the large ones the teacher, a moving average of it. Both end in a
distribution over K dimensions, and the student has to find from every crop what the teacher says of each other large
one. Centring the teacher's scores keeps one dimension from winning always, a low temperature keeps all from being
alike: each alone would collapse, both together do not.

    Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision
    Transformers. ICCV 2021, arXiv:2104.14294. Code: facebookresearch/dino.

Follows the code: the loss is the mean over pairs of crops (the paper adds), the centre moves after it was used, the
teacher runs in training mode without stochastic depth and its BatchNorm gathers statistics of its own, gradients are
clipped tensor by tensor, the last layer rests in the first epoch. Deviation: the last layer's scores are float32 under
mixed precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.dino import centred_softmax, dino, next_centre
from selfsight.methods.base import Method
from selfsight.nn.dino_head import DINOHead
from selfsight.nn.ema import EMATeacher
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.vit import without_drop_path
from selfsight.optim.clipping import clip_each
from selfsight.validation import SHARE, SWITCH, above, at_least, takes, whole


@takes(
    out_dim=whole(2),
    head_layers=whole(1),
    hidden_dim=whole(1),
    bottleneck_dim=whole(1),
    head_norm=SWITCH,
    norm_last_layer=SWITCH,
    student_temperature=above(0),
    centre_momentum=SHARE,
    n_global=whole(1),
    freeze_last_layer_epochs=whole(0),
    clip_grad=at_least(0),
)
class DINO(Method):
    """Self-distillation with no labels: from every crop, what a slow copy says of each other large one.

    The teacher's momentum and temperature are the scheduled values ``teacher_momentum`` and ``teacher_temperature``;
    that of the weight decay, where there is one, goes to the optimiser.

    Args:
        backbone: network to be trained.
        out_dim: K; 65536 for ImageNet, fewer for small data.
        head_layers: linear layers of the head before unit length, see `DINOHead`.
        hidden_dim: their width.
        bottleneck_dim: width of what is brought to unit length.
        head_norm: BatchNorm between them.
        norm_last_layer: the rows of the last layer stay unit vectors.
        student_temperature: tau_s.
        centre_momentum: what the centre keeps at each step.
        n_global: large crops, the first ones, which the teacher sees.
        freeze_last_layer_epochs: first epochs in which the last layer stays as it is.
        clip_grad: longest gradient of a tensor; 0: any.

    Attributes:
        centre: ``[K]`` running mean of the teacher's scores.
    """

    n_views = (2, None)
    decay_places = True
    schedules = ("teacher_momentum", "teacher_temperature")
    centre: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int = 65536,
        head_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_norm: bool = False,
        norm_last_layer: bool = True,
        student_temperature: float = 0.1,
        centre_momentum: float = 0.9,
        n_global: int = 2,
        freeze_last_layer_epochs: int = 1,
        clip_grad: float = 3.0,
    ) -> None:
        super().__init__(backbone)
        width: int = backbone.num_features  # type: ignore[assignment]
        self.head = DINOHead(
            width, out_dim, layers=head_layers, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, norm=head_norm,
            norm_last_layer=norm_last_layer,
        )  # fmt: skip
        self.teacher = EMATeacher(self.student, buffers="keep")
        without_drop_path(self.teacher)
        self.register_buffer("centre", torch.zeros(out_dim))
        self.student_temperature, self.centre_momentum = student_temperature, centre_momentum
        self.n_global, self.clip_grad = n_global, clip_grad
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    @property
    def student(self) -> nn.ModuleDict:
        """Backbone and head."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    @property
    def measured(self) -> nn.Module:
        """The teacher's backbone, as in the paper and in what its authors have released."""
        return self.teacher.get_submodule("module.backbone")

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        G = self.global_crops(batch)
        s = self.scores(self.student, batch.views)  # [M, B, K]
        with torch.no_grad():
            t = self.scores(self.teacher.module, batch.views[:G])  # [G, B, K]
        T = centred_softmax(t, self.centre, temperature=self.scheduled["teacher_temperature"])
        loss = dino(s, T, temperature=self.student_temperature)
        self.collect(scores=t.mean((0, 1))[None])  # [1, K]: the mean of equally many rows on each process
        return {"loss": loss, **self.monitors(loss.detach(), T)}

    @staticmethod
    def scores(network: nn.Module, crops: Sequence[Tensor]) -> Tensor:
        """``[M, B, K]`` of M crops: a forward of the backbone for each size, one of the head for all."""
        h = multi_crop(network["backbone"], crops)  # type: ignore[index]
        return network["head"](h).unflatten(0, (len(crops), -1))  # type: ignore[index]

    def global_crops(self, batch: Batch) -> int:
        """G, after a look at the batch.

        Raises:
            UserError: there are no more views than global ones, or only one.
        """
        M = len(batch.views)
        if not 1 <= self.n_global <= M or M < 2:
            raise UserError(
                f"DINO compares every view with each other global one and got {M} views of which {self.n_global} are "
                "global; give it two views or more (views.global.count), and no more global ones than views."
            )
        return self.n_global

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.clip_grad > 0:
            clip_each(self.parameters(), self.clip_grad)
        if self.epoch < self.freeze_last_layer_epochs:
            for p in self.head.last_layer.parameters():
                p.grad = None  # no gradient at all, or weight decay and momentum would move it

    def take_in(self, scores: Tensor) -> None:
        self.centre.copy_(next_centre(self.centre, scores, momentum=self.centre_momentum))

    def after_step(self) -> None:
        self.teacher.update(self.student, self.scheduled["teacher_momentum"])

    def chance_loss(self) -> float:
        """``ln K``: predictions are uniform; untrained, or collapsed."""
        return math.log(len(self.centre))

    @torch.no_grad()
    def monitors(self, loss: Tensor, T: Tensor) -> dict[str, Tensor]:
        """Which way it collapses, if it does.

        ``teacher_entropy``: of the targets over ln K; at 1 they are uniform, at 0 one dimension wins always.
        ``divergence``: what is left of the loss beside that entropy. ``centre_norm``: length of the centre.
        """
        entropy = torch.special.entr(T).sum(-1).mean()
        return {
            "teacher_entropy": entropy / self.chance_loss(),
            "divergence": loss - entropy,
            "centre_norm": self.centre.norm(),
        }
