"""Callbacks that have a say before training begins: EfficientTrain's, and those of a person's own."""

from __future__ import annotations

from lightning.pytorch import Callback

from selfsight.datamodules import DataModule
from selfsight.methods.base import Method
from selfsight.optim.schedule import Clock


class PreparedCallback(Callback):
    """A callback that is asked when the parts of a run are made, so that what cannot be is refused before training.

    Attributes:
        about: a line for the head of the run; empty: none.
    """

    about = ""

    def prepare(self, learner: Method, data: DataModule, length: Clock, *, graphs: bool = False) -> None:
        """Look at the parts of a run, and change what is to be changed.

        Args:
            length: of the run. graphs: steps replay recorded kernels.

        Raises:
            UserError: the callback cannot work with them.
        """
