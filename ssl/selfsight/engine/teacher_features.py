"""Features of a frozen teacher that need not see every view: extracted once, and kept in the run folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from selfsight.datamodules import DataModule, ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.engine.measure import learnt_from
from selfsight.engine.prepared import PreparedCallback
from selfsight.evaluation.views import plain_view
from selfsight.methods.base import Method
from selfsight.nn.distributed import PatientBarrier, rank
from selfsight.optim.schedule import Clock

#: folder of a run that they lie in, under a checksum of the teacher, the images and how these are shown
FOLDER = "teacher"


class TeacherFeatures(PreparedCallback):
    """Before training begins or goes on, gives a method the features that it asks for in `Method.shown_once`.

    The first process extracts them, or finds them in the run folder; the others read what it has written.
    """

    def prepare(self, learner: Method, data: DataModule, length: Clock, *, graphs: bool = False) -> None:
        once = learner.shown_once(plain=plain(data))
        self.about = (
            f"the teacher sees every view, since {once}"
            if isinstance(once, str)
            else f"the teacher sees each image once, as evaluation does; its features are kept in {FOLDER}/ of the run"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: Method) -> None:  # type: ignore[override]
        barrier, data = PatientBarrier(), trainer.datamodule  # type: ignore[attr-defined]
        barrier.begin()
        if rank() > 0:
            barrier.wait()
        with isolate_rng():  # what is learnt must not depend on whether they were there
            give(pl_module, data, Path(trainer.default_root_dir))
        if rank() == 0:
            barrier.wait()


def give(method: Method, data: DataModule, run: Path) -> None:
    """Give a method the features that it asks for, from a folder of the run where they lie there already."""
    teacher = method.shown_once(plain=plain(data))
    if not isinstance(teacher, str):
        features, _ = learnt_from(teacher, data, cache=run / FOLDER)
        method.take_features(features.x, features.indices)


def plain(data: DataModule) -> bool:
    """Whether the views of a data module are what evaluation sees, at every step."""
    if not isinstance(data, ImageDataModule) or data.curriculum is not None:
        return False
    seen = geometry(plain_view(data))
    return all(
        view.draws == 0 and not view.of_channels and not view.transforms and geometry(view) == seen
        for view in data.views
    )


def geometry(view: View) -> tuple[object, ...]:
    """What makes a view where nothing is random."""
    return view.size, view.crop, view.crop_fraction, view.interpolation, view.mean, view.std
