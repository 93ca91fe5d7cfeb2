"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780).

The network is trained to say of one view of an image what an average of its earlier weights says of another. The
averaged network is the more accurate of the two, and gets better as the other does.

The consistency is that of the paper, between student and teacher: in microsoft/Semi-supervised-learning the teacher is
compared with itself, so that the term is zero. Its weight, its ramp and a teacher in training mode are those of
google-research/remixmatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.contracts import SemiBatch
from selfsight.errors import UserError, nearest
from selfsight.losses.semi import cross_entropy, squared_error
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.optim.schedule import Ramp
from selfsight.validation import SHARE, SWITCH, at_least, takes, whole


@takes(num_classes=whole(2), weight=at_least(0), ramp=SHARE, labelled_consistency=SWITCH)
class MeanTeacher(SemiMethod):
    """Consistency with an average of the network itself.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        weight: final weight of the consistency.
        ramp: share of the run in which it grows from 0.
        labelled_consistency: labelled images count in it as well; they come in two views then.
        teacher_moves: ``after`` the optimiser's step, or ``before`` it, towards the weights the gradients are of
            (Labbeti/SSLH).
    """

    n_views = (2, 2)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        weight: float = 50.0,
        ramp: float = 0.4,
        labelled_consistency: bool = False,
        teacher_moves: Literal["after", "before"] = "after",
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes, teacher_buffers="keep")
        if teacher_moves not in ("after", "before"):
            raise UserError(
                f"Mean Teacher's teacher_moves is '{teacher_moves}'; one of after, before."
                f"{nearest(teacher_moves, ('after', 'before'))}"
            )
        self.weight, self.ramp = weight, ramp
        self.labelled_consistency, self.teacher_moves = labelled_consistency, teacher_moves

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        x, u1, u2 = self.views(batch)
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_u,) = self.student_forward(x, u1)  # [B, C], [M, C]
        if self.labelled_consistency:
            student = torch.cat([logits_x, logits_u])
            (t_x,), (t_u,) = self.teacher_forward(self.second_labelled_view(batch), u2)
            teacher = torch.cat([t_x, t_u])  # [B + M, C]
        else:
            student, ((teacher,),) = logits_u, self.teacher_forward(u2)  # [M, C] each
        p = teacher.softmax(-1)
        L_s = cross_entropy(logits_x, y)
        L_c = squared_error(student, p)
        rate = self.weight * Ramp(0.0, 1.0, self.ramp)(self.step, self.clock)
        p = p[-len(u2) :]
        everyone = self.monitors(torch.ones_like(p[:, 0]), p, batch.unlabelled)
        return {"loss": L_s + rate * L_c, "loss_sup": L_s.detach(), "loss_unsup": L_c.detach(), **everyone}

    @staticmethod
    def second_labelled_view(batch: SemiBatch) -> Tensor:
        """What the teacher sees of labelled images.

        Raises:
            UserError: they have one view.
        """
        views = batch.labelled.views
        if len(views) < 2:
            raise UserError(
                "MeanTeacher compares student and teacher on labelled images too, and got one view of them; set "
                "views.labelled.count to 2, or method.labelled_consistency to false."
            )
        return views[1]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.teacher_moves == "before":
            if self.goes_again:  # the teacher has moved since the first time, and the weights are not those of the step
                raise UserError(
                    "method.teacher_moves=before moves the teacher between the two passes of optimizer.sam; take the "
                    "paper's method.teacher_moves=after."
                )
            super().after_step()

    def after_step(self) -> None:
        if self.teacher_moves == "after":
            super().after_step()
