"""SupCon: images of one class attract each other, all others repel each other.

Several views of every image pass one network and a small projection head. Each projection has to be nearer to the other
views of its image and to all views of images of its class than to anything else in the batch, so that many positives
and many negatives act at once. Without labels the same loss is SimCLR's.

    Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan: Supervised Contrastive Learning. NeurIPS 2020,
    arXiv:2004.11362. Code: HobbitLong/SupContrast (their CIFAR numbers), google-research/supcon (their ImageNet
    numbers).

Follows SupContrast where the two differ from each other and from the paper: a loss scaled by T / 0.07 (the paper: by T;
``base_temperature``), an encoder output that is not normalised before the head (``normalize_embedding``), weight decay
on all parameters (``decay``). Deviations: the log-sum-exp leaves the anchor out before it is taken, which is equal and
does not underflow; under data parallel training every process compares its anchors with the embeddings of all, where
the authors' code gathers on one device; an image labelled -1 is a class of its own. The variant with a memory of
momentum embeddings, whose code is not published, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.supcon import CONTRAST_MODES, DENOMINATORS, SUMMATIONS, by_image, supcon
from selfsight.methods.base import Method
from selfsight.nn.distributed import gather_without_grad, rank
from selfsight.nn.heads import mlp
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.precision import float32
from selfsight.validation import SWITCH, above, one_of, takes, whole


@takes(
    supervised=SWITCH, hidden_dim=whole(0), dim=whole(1), last_bias=SWITCH, init_std=above(0),
    normalize_embedding=SWITCH, temperature=above(0), base_temperature=above(0), contrast_mode=one_of(*CONTRAST_MODES),
    summation=one_of(*SUMMATIONS), denominator=one_of(*DENOMINATORS), positives_cap=whole(0),
    decay=one_of("all", "kernels"),
)  # fmt: skip
class SupCon(Method):
    """Supervised contrastive learning: views of images of one class are to be nearer than anything else in a batch.

    Defaults are SupContrast's; google-research's for ImageNet are those of recipe=imagenet/supcon.

    Args:
        backbone: network to be trained.
        supervised: images of one class belong together; False: only the views of one image (SimCLR).
        hidden_dim: width of the head's hidden layer; None takes that of the backbone, 0 makes the head a linear layer.
        dim: D of the embeddings.
        last_bias: whether the head's last layer has a bias; google-research: not.
        init_std: of the head's first weights, biases at 0 then; None is PyTorch's rule, google-research takes 0.01.
        normalize_embedding: the backbone's output is divided by its norm before the head.
        temperature: T, see `supcon_per_anchor`.
        base_temperature: scales the loss by ``T / T_base``; None: not at all.
        contrast_mode: anchors are ``all`` views, or ``one``: the first.
        summation: ``out`` (equation 2) or ``in`` (equation 3).
        denominator: ``all``, ``one_positive`` or ``only_negatives``.
        positives_cap: most views of other images of the class that count; None: all.
        decay: ``all`` parameters (SupContrast) or ``kernels``, which spares biases and normalisation (google-research).

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, None)
    across_images = "an image is compared with the other images of its batch"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        supervised: bool = True,
        hidden_dim: int | None = None,
        dim: int = 128,
        last_bias: bool = True,
        init_std: float | None = None,
        normalize_embedding: bool = False,
        temperature: float = 0.1,
        base_temperature: float | None = 0.07,
        contrast_mode: Literal["all", "one"] = "all",
        summation: Literal["out", "in"] = "out",
        denominator: Literal["all", "one_positive", "only_negatives"] = "all",
        positives_cap: int | None = None,
        decay: Literal["all", "kernels"] = "all",
    ) -> None:
        super().__init__(backbone)
        width = cast(int, backbone.num_features)
        hidden = width if hidden_dim is None else hidden_dim
        self.projector = mlp([width, hidden, dim] if hidden else [width, dim], last_bias=last_bias, of_features=True)
        if init_std is not None:
            _initialise(self.projector, init_std)
        self.supervised, self.normalize_embedding, self.decay = supervised, normalize_embedding, decay
        self.options: dict[str, Any] = {
            "temperature": temperature, "base_temperature": base_temperature, "contrast_mode": contrast_mode,
            "summation": summation, "denominator": denominator, "positives_cap": positives_cap,
        }  # fmt: skip
        self._views = self.n_views[0]  # of the latest batch; what the chance level depends on

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        V = self._views = len(batch.views)
        y = self.classes(batch)  # [B] or None
        h = multi_crop(self.backbone, batch.views)  # [V B, F]
        z = by_image(self.project(h), V)  # [B, V, D]
        loss = supcon(z, y, **self.options)
        return {"loss": loss, **self.monitors(z.detach(), y)}

    def project(self, h: Tensor) -> Tensor:
        """Features ``[..., F]`` of the backbone to unit embeddings ``[..., D]``."""
        return unit(self.projector(unit(h) if self.normalize_embedding else h))

    def classes(self, batch: Batch) -> Tensor | None:
        """``[B]`` numbers that are equal where images belong together; None where only views of one image do."""
        if not self.supervised:
            return None
        if batch.labels is None:
            raise UserError(
                "SupCon attracts images of one class and these images have no labels; choose a labelled data set, or "
                "method.supervised=false, which is SimCLR."
            )
        return torch.where(batch.labels < 0, -1 - batch.indices, batch.labels)

    def chance_loss(self) -> float | None:
        """All embeddings agree: ``T / T_base ln(V N - 1)`` for V views of N images; none for other denominators."""
        if self.options["denominator"] != "all" or self.options["positives_cap"] is not None:
            return None
        T, base = self.options["temperature"], self.options["base_temperature"]
        return T / (base or T) * math.log(max(1, self._views * self.clock.batch_size - 1))

    @torch.no_grad()
    def monitors(self, z: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """What the loss does not tell, of the first view of every image.

        ``positives``: mean number of other images that belong to it; 0 makes this SimCLR. ``nearest_agrees``: share of
        images whose nearest other embedding among all views belongs to it. ``embedding_std``: spread of the
        embeddings, 1 on the whole sphere, near 0 when all have collapsed.
        """
        B, V, D = z.shape
        keys = gather_without_grad(z)  # [N, V, D]
        own = torch.arange(B, device=z.device) + rank() * B
        every = torch.arange(len(keys), device=z.device)
        same = own[:, None] == every if y is None else y[:, None] == gather_without_grad(y)  # [B, N]
        similarity = torch.einsum("bd,nvd->bnv", z[:, 0], keys)  # [B, N, V]
        similarity[torch.arange(B, device=z.device), own, 0] = -torch.inf
        nearest = similarity.flatten(1).argmax(1) // V  # [B]
        return {
            "positives": same.sum(1).to(z.dtype).mean() - 1,
            "nearest_agrees": same.gather(1, nearest[:, None]).to(z.dtype).mean(),
            "embedding_std": keys.flatten(0, 1).std(dim=0, correction=0).mean() * D**0.5,
        }


def unit(x: Tensor) -> Tensor:
    return F.normalize(float32(x), dim=-1)


def _initialise(head: nn.Module, std: float) -> None:
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
