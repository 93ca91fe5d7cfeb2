"""Fine-tuning on few labels, the second step of SimCLRv2.

The projection head is not thrown away: a zero-initialised classifier is put on one of its layers, and everything below
is trained with a small learning rate. With the head's first layer kept, few labels go further than from the backbone's
output, the more so the larger the network.

    Chen, Kornblith, Swersky, Norouzi, Hinton: Big Self-Supervised Models are Strong Semi-Supervised Learners.
    NeurIPS 2020, arXiv 2006.10029, section 2. Code: google-research/simclr, model.py and tf2/model.py.

The authors' two implementations differ in whether kept layers of the head are trained; ``freeze_projector`` chooses.
What other recipes of fine-tuning add (SparK's: layer-wise learning rates, erased and mixed images, an averaged model)
is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones import timm
from selfsight.contracts import REGRESSION, Batch, Targets
from selfsight.errors import UserError
from selfsight.losses.logit_adjustment import adjusted, log_shares
from selfsight.losses.mixing import (
    cutmix,
    cutmix_box,
    even_batch,
    mixed_targets,
    mixup,
    soft_binary_cross_entropy,
)
from selfsight.methods.base import Method
from selfsight.nn.ema import EMATeacher
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.nn.units import Units
from selfsight.optim import l2_penalty
from selfsight.optim.groups import ParamGroup, layer_decayed, split_no_decay
from selfsight.validation import AUTO, SHARE, SWITCH, above, at_least, takes, whole


@takes(
    num_classes=whole(1), layer=AUTO | whole(-1), freeze_projector=SWITCH, freeze_after=whole(-1),
    frozen_statistics=SWITCH, classifier_decay=at_least(0), plain_classifier=SWITCH, layer_decay=above(0),
    mixup=at_least(0), cutmix=at_least(0), label_smoothing=SHARE, binary=SWITCH, erasing=SHARE, ema=SHARE,
    logit_adjustment=at_least(0),
)  # fmt: skip
class FineTune(Method):
    """Fine-tuning: a classifier on the backbone, or on a layer of its projection head, and all below it are trained.

    Defaults are SimCLRv2's for few labels of ImageNet, without what later recipes add.

    Args:
        backbone: pretrained network.
        num_classes: K.
        projector: the head the backbone was pretrained with, or None.
        layer: of the head's outputs; 0 is the backbone's, 1 the paper's choice for few labels, -1 the head's last.
            ``auto`` is 1 with a head and 0 without.
        freeze_projector: kept layers of the head pass gradients on but stay as they are (TensorFlow 1 code); otherwise
            they are trained (TensorFlow 2 code).
        freeze_after: -1 trains the whole backbone; b leaves the stem and the first b stages as they are, 4 all of it.
        frozen_statistics: BatchNorm of frozen stages keeps its statistics (TensorFlow 2 code); False lets them follow
            the new images (TensorFlow 1 code). Those of a wholly frozen backbone always stay.
        classifier_decay: L2 on the classifier's kernel, as a term of the loss.
        plain_classifier: it begins at zero, and the optimiser neither decays nor layer-adapts it (SimCLRv2); False
            treats it like any other layer (SparK, MAE).
        classifier_std: of the first weights of a classifier that is not plain, biases at 0 then; None: PyTorch's rule.
        layer_decay: below 1 every layer learns more slowly than the one above it, by this factor.
        mixup: parameter of the Beta distribution that mixes pairs of images; with ``cutmix``, too, one of them by turns
            of a coin.
        cutmix: parameter of the Beta distribution of boxes pasted from another image.
        label_smoothing: share of the target spread over all classes.
        binary: every class is a question of its own (binary cross-entropy) instead of one among all.
        erasing: probability that a box of a fiftieth to a third of an image becomes noise (timm's RandomErasing), image
            by image, before any are mixed.
        ema: momentum of an averaged model, which is evaluated beside the network; 0 for none.
        logit_adjustment: tau of `losses.logit_adjustment`, for classes of unequal size; 1 is the paper's, 0 none.
        labels: of the images, -1 for none: the shares of the classes are counted in them.
        targets: of the images to learn from, where they have several labels or numbers in place of a class: each label
            is a question of its own (binary cross-entropy), numbers are fitted by least squares, relative to the
            variance of their column. What is not known is left out.

    Raises:
        UserError: what mixes or weighs classes, and there are none; the head has no such layer, the backbone no such
            stage, or values that cannot be meant.
    """

    needs = ("num_classes", "labels", "targets")
    n_views = (1, 1)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        projector: ProjectionHead | None = None,
        layer: int | Literal["auto"] = "auto",
        freeze_projector: bool = False,
        freeze_after: int = -1,
        frozen_statistics: bool = True,
        classifier_decay: float = 0.0,
        plain_classifier: bool = True,
        classifier_std: float | None = None,
        layer_decay: float = 1.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        binary: bool = False,
        erasing: float = 0.0,
        ema: float = 0.0,
        logit_adjustment: float = 0.0,
        labels: Tensor | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(backbone)
        of_classes = {
            "mixup": mixup, "cutmix": cutmix, "label_smoothing": label_smoothing, "binary": binary,
            "logit_adjustment": logit_adjustment,
        }  # fmt: skip
        if targets is not None and (asked := next((name for name, value in of_classes.items() if value), None)):
            raise UserError(f"method.{asked} is for classes, and the images have {targets}: leave it out.")
        self.regression = targets is not None and targets.kind == REGRESSION
        self.units = Units.of(targets.values) if targets is not None and self.regression else nn.Identity()
        if logit_adjustment and binary:
            raise UserError(
                "method.logit_adjustment weighs the classes against each other, and method.binary=true asks about them "
                "one by one: choose one of the two."
            )
        self.logit_adjustment = logit_adjustment
        shares = None if labels is None else log_shares(labels, num_classes)
        self.register_buffer("log_shares", shares, persistent=False)
        depth = 0 if projector is None else len(projector)
        used = min(1, depth) if layer == "auto" else depth if layer == -1 else int(layer)
        if not 0 <= used <= depth:
            raise UserError(
                f"Fine-tuning from layer {layer} of the projection head was asked for, and this network's head has "
                f"{depth} layers: give a number from 0 (the backbone's output) to {depth}."
            )
        self.projector, self.layer, self.classifier_decay = projector, used, classifier_decay
        self.layer_decay, self.mixup, self.cutmix, self.smoothing = layer_decay, mixup, cutmix, label_smoothing
        self.binary = binary
        # on normalised images, where noise of unit variance is what the authors fill with
        self.erasing = timm.data.random_erasing.RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        width: int = backbone.num_features  # type: ignore[assignment]
        if projector is not None:
            width = projector.widths[used]
            projector.requires_grad_(not freeze_projector)
            for unused in list(projector)[used:]:
                unused.requires_grad_(False)
        self.classifier = nn.Linear(width, num_classes)
        self.plain_names = ("classifier.",) if plain_classifier else ()
        if plain_classifier or classifier_std is not None:
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
            if classifier_std and not plain_classifier:
                nn.init.trunc_normal_(self.classifier.weight, std=classifier_std)
        frozen = first_stages(backbone, freeze_after)
        for name in frozen:
            backbone.get_submodule(name).requires_grad_(False)
        self._kept = frozen if frozen_statistics or frozen == [""] else []
        self.average = EMATeacher(self.network, ema, "ema") if ema else None
        self.train()

    @property
    def network(self) -> nn.Sequential:
        """What classifies: backbone, kept layers of the head, classifier; numbers come out in their own units."""
        kept = [] if self.projector is None else list(self.projector)[: self.layer]
        return nn.Sequential(self.backbone, *kept, self.classifier, *([self.units] if self.regression else []))

    def classifiers(self) -> dict[str, nn.Module]:
        return {"student": self.network} | ({} if self.average is None else {"teacher": self.average})

    def train(self, mode: bool = True) -> FineTune:
        super().train(mode)
        for name in self._kept:  # by name: synchronised BatchNorm puts other modules in the place of some
            self.backbone.get_submodule(name).eval()
        return self

    def selected(self, x: Tensor) -> Tensor:
        """What the classifier sees: images ``[B, 3, H, W] -> [B, D]``."""
        h = self.backbone(x)
        return h if self.projector is None else self.projector.outputs(h)[self.layer]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        return self.classifier(self.selected(x))

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        decay = l2_penalty([self.classifier.weight], self.classifier_decay)
        if batch.targets is not None:
            return {"loss": self.target_loss(self(self.erased(batch.views[0])), batch.targets.values) + decay}
        assert batch.labels is not None, "fine-tuning needs labels"
        x, targets = self.mixed(self.erased(batch.views[0]), batch.labels)
        logits = self(x)  # [B, K]
        loss = soft_binary_cross_entropy(logits, targets) if self.binary else self.cross_entropy(logits, targets)
        loss = loss + decay
        if targets.ndim == 2:
            return {"loss": loss}
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return {"loss": loss, "train_accuracy": accuracy}

    def target_loss(self, said: Tensor, values: Tensor) -> Tensor:
        """Of outputs ``[B, T]`` against labels or numbers, over what is known of them."""
        known = ~values.isnan()
        if isinstance(self.units, Units):
            each = F.mse_loss(said, self.units.standardised(values).nan_to_num(), reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(said, values.nan_to_num(), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits ``[B, K]``, with the shares of the classes added where that is asked for."""
        if self.logit_adjustment:
            assert isinstance(self.log_shares, Tensor), "the labels are known when it is trained"
            logits = adjusted(logits, self.log_shares, self.logit_adjustment)
        return F.cross_entropy(logits, targets)

    def erased(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, some with a box of noise."""
        if self.erasing is None:
            return x
        self.erasing.device = x.device  # where the noise is made
        return self.erasing(x.clone())

    def mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images and classes ``[B]`` as they are; or mixed in pairs, with target distributions ``[B, K]``."""
        if not (self.mixup or self.cutmix or self.smoothing or self.binary):
            return x, y
        if self.mixup or self.cutmix:
            x, y = even_batch(x, y)
        weight = 1.0
        if self.mixup and not (self.cutmix and float(torch.rand(())) < 0.5):
            weight = draw_weight(self.mixup)
            x = mixup(x, weight)
        elif self.cutmix:
            height, width = x.shape[-2:]
            centre = int(torch.randint(height, ())), int(torch.randint(width, ()))
            x, weight = cutmix(x, cutmix_box(height, width, draw_weight(self.cutmix), centre))
        return x, mixed_targets(y, self.classifier.out_features, weight, self.smoothing)

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.network)

    def param_groups(self) -> list[ParamGroup]:
        if self.layer_decay != 1:
            return layer_decayed(self, self.layer_decay, plain_names=self.plain_names)
        return split_no_decay(self, plain_names=self.plain_names)


def draw_weight(alpha: float) -> float:
    """lambda ~ Beta(alpha, alpha)."""
    return float(torch.distributions.Beta(alpha, alpha).sample())


def first_stages(backbone: nn.Module, number: int) -> list[str]:
    """Names of the modules before stage ``number + 1``: none for -1, the stem for 0, ``""`` for all of the backbone.

    Raises:
        UserError: the backbone has fewer stages.
    """
    if number < 0:
        return []
    info: list[dict[str, Any]] = backbone.feature_info  # type: ignore[assignment]
    stages = [str(stage["module"]) for stage in info[-4:]]
    if number > len(stages):
        raise UserError(f"Freezing {number} stages was asked for; this backbone has {len(stages)}.")
    if number == len(stages):
        return [""]
    names = [name for name, _ in backbone.named_modules()]
    before = names[1 : names.index(stages[number])]
    return [name for name in before if not stages[number].startswith(f"{name}.")]
