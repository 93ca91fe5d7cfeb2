"""SimMatchV2: semi-supervised learning with graph consistency (Zheng et al., ICCV 2023, arXiv 2308.06692).

Images are nodes that carry a class distribution, their similarities are edges. A teacher that averages the student
labels each unlabelled image from its weak view, refines that label by propagation from the nearest labelled images,
and the student has to agree from strong views: node with node, edges with edges, and labels gathered along the edges
with the node. Labelled and unlabelled embeddings of the teacher are kept in two banks.

Follows the authors' code (mingkai-zheng/SimMatchV2) where it says more than the paper: pseudo-labels are aligned to
uniform by the running mean as it was *before* the batch; the mask looks at the aligned label, the target is the
refined one; the losses along edges are not masked; strong views after the first pass the network one by one.

Deviations. Edges are taken as log-softmax, which is equal and does not underflow. Propagation solves one linear
system instead of inverting the matrix. The bank may have any length (the authors need a multiple of the batch).
Of an image drawn twice in one step the last embedding stays. The order in which the teacher's batch is shuffled over
processes follows from the step, so that a resumed run repeats it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses import simmatchv2 as loss
from selfsight.losses.semi import cross_entropy
from selfsight.methods.semi.base import Heads, SemiMethod, write_rows
from selfsight.nn.queue import Queue
from selfsight.validation import SHARE, SWITCH, above, at_least, number, one_of, takes, whole

BELOW_ONE = number("a share from 0 to below 1", lambda v: 0 <= v < 1)


@takes(
    num_classes=whole(2), dim=whole(1), K=whole(1), t=above(0), alpha=BELOW_ONE, topn=whole(1), tau=at_least(0),
    lambda_nn=at_least(0), lambda_ee=at_least(0), lambda_ne=at_least(0), da_m=SHARE, norm_feat=SWITCH, eman=SWITCH,
    decay=one_of("all", "kernels"),
)  # fmt: skip
class SimMatchV2(SemiMethod):
    """Graph consistency: images are nodes with labels, joined by their likeness, and views agree in nodes and edges.

    Defaults are the authors' for 1 % of ImageNet's labels.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        dim: D of the embeddings.
        K: rows of the unlabelled bank.
        t: temperature of all edges.
        alpha: share of a label handed on in propagation, in [0, 1).
        topn: labelled neighbours of a sample; at most the labelled set.
        tau: confidence a pseudo-label needs to count in ``L_nn``.
        lambda_nn: weight of the node-node loss.
        lambda_ee: weight of the edge-edge loss.
        lambda_ne: weight of the node-edge loss.
        da_m: momentum of the running mean for distribution alignment; None leaves alignment out.
        norm_feat: LayerNorm in front of both heads.
        eman: the teacher averages BatchNorm's running statistics as well and runs in eval mode; else it averages
            parameters only and runs in train mode, its batch shuffled over processes.
        decay: weight decay on ``all`` parameters, or on ``kernels``, which spares biases and normalisation.

    Attributes:
        l_bank: ``[N_l, D]`` teacher embedding of each labelled image.
        l_labels: ``[N_l]`` its class.
        u_bank: ``[K, D]`` teacher embeddings of the last unlabelled images.
        u_labels: ``[K, C]`` their aligned labels.
        da: ``[1, C]`` running mean of raw teacher probabilities.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, None)
    l_bank: Tensor
    l_labels: Tensor
    da: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        dim: int = 128,
        K: int = 81920,
        t: float = 0.1,
        alpha: float = 0.1,
        topn: int = 128,
        tau: float = 0.7,
        lambda_nn: float = 10.0,
        lambda_ee: float = 10.0,
        lambda_ne: float = 10.0,
        da_m: float | None = 0.9,
        norm_feat: bool = True,
        eman: bool = False,
        decay: Literal["all", "kernels"] = "all",
    ) -> None:
        heads = Heads(backbone.num_features, num_classes, dim, norm_feat=norm_feat)  # type: ignore[arg-type]
        super().__init__(
            backbone, heads, labels=labels, num_classes=num_classes, teacher_buffers="ema" if eman else "keep",
            decay=decay,
        )  # fmt: skip
        if topn > len(labels):
            warnings.warn(f"topn is {topn}, but only {len(labels)} images are labelled; all are used.", stacklevel=2)
        self.t, self.alpha, self.tau, self.n = t, alpha, tau, min(topn, len(labels))
        self.lambda_nn, self.lambda_ee, self.lambda_ne = lambda_nn, lambda_ee, lambda_ne
        self.da_m = da_m
        self.register_buffer("l_bank", F.normalize(torch.randn(len(labels), dim)))
        self.register_buffer("l_labels", labels.clone())
        self.u_bank = Queue(K, dim, unit=True)
        self.u_labels = Queue(K, num_classes)
        self.register_buffer("da", torch.full((1, num_classes), 1 / num_classes))
        # Every process writes the same rows, so DDP need not send up to a gigabyte from the first one each step.
        self._ddp_params_and_buffers_to_ignore = ["l_bank", "l_labels", "u_bank.data", "u_labels.data"]

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        x, u_w, *u_s = self.views(batch)
        y, index = batch.labelled.labels, batch.labelled.indices
        assert y is not None, "labelled images carry labels"
        (_, z_x), (logits_u, z_u) = self.teacher_forward(x, u_w)  # [B, D], [M, C], [M, D]
        p = self.align(logits_u.softmax(-1))  # [M, C]
        r = loss.refine(z_u, p, self.l_bank, self.l_labels, n=self.n, t=self.t, alpha=self.alpha)  # [M, C]
        mask = (p.amax(-1) >= self.tau).to(p.dtype)  # [M]; of p, not of r
        k = loss.log_edges(z_u, self.u_bank.data, self.t).exp()  # [M, K]

        logits_x, logits_s, z_s = self.student_views(x, u_s)  # [B, C], [S, M, C], [S, M, D]
        k_s = loss.log_edges(z_s, self.u_bank.data, self.t)  # [S, M, K]

        L_sup = cross_entropy(logits_x, y)
        L_nn = loss.node_node(logits_s, r, mask)
        L_ee = loss.edge_edge(k_s, k)
        L_ne = loss.node_edge(k_s, p, self.u_labels.data)
        total = L_sup + self.lambda_nn * L_nn + self.lambda_ee * L_ee + self.lambda_ne * L_ne
        self.remember(z_x, index, z_u, p)
        terms = {"loss_sup": L_sup, "loss_nn": L_nn, "loss_ee": L_ee, "loss_ne": L_ne}
        monitors = self.monitors(mask, r, batch.unlabelled)
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}, **monitors}

    @torch.no_grad()
    def align(self, q: Tensor) -> Tensor:
        """Probabilities aligned by the running mean as it was before the step; it takes in the raw ones."""
        if self.da_m is None:
            return q
        self.collect(q=q.mean(0, keepdim=True))
        return loss.align(q, self.da)

    def student_views(self, x: Tensor, u_s: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits of ``x``, logits and embeddings of ``S`` strong views; the first goes with ``x``."""
        (logits_x, _), first = self.student_forward(x, u_s[0])
        others = [self.student_forward(view)[0] for view in u_s[1:]]
        logits, z = zip(first, *others, strict=True)
        return logits_x, torch.stack(logits), torch.stack(z)

    def remember(self, z_x: Tensor, index: Tensor, z_u: Tensor, p: Tensor) -> None:
        """Keep the teacher's view of this batch for the banks.

        Args:
            z_x: ``[B, D]`` embeddings of labelled images.
            index: ``[B]`` their rows.
            z_u: ``[M, D]`` embeddings of unlabelled images.
            p: ``[M, C]`` their aligned labels.
        """
        self.collect(z_x=z_x, index=index, z_u=z_u, p=p)

    def take_in(self, q: Tensor | None = None, **rows: Tensor) -> None:
        if q is not None and self.da_m is not None:
            self.da.mul_(self.da_m).add_((1 - self.da_m) * q.mean(0))
        if rows:
            write_rows(self.l_bank, rows["index"], rows["z_x"])
            self.u_bank.push(rows["z_u"])
            self.u_labels.push(rows["p"])
