"""Runs in services that follow runs: one there for one here, however often it is resumed, with its configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger

from selfsight.backbones.interface import one_line
from selfsight.engine.options import resolved
from selfsight.errors import UserError
from selfsight.files import write_text
from selfsight.runs.folder import RunFolder
from selfsight.runs.processes import on_first_process

MLFLOW = "lightning.pytorch.loggers.MLFlowLogger"
WANDB = "lightning.pytorch.loggers.WandbLogger"

Values = Mapping[str, object]


def opened(target: str, given: Values, folder: RunFolder, make: Callable[..., Logger]) -> Logger:
    """A logger of a run, under the id that the run has had so far.

    Args:
        target: its class. given: what the configuration says of it. make: takes further arguments.

    Raises:
        UserError: MLflow cannot open its store.
    """
    if target == WANDB and given.get("id") is None:
        return make(id=folder.tracker_id(), resume="allow")
    if target != MLFLOW:
        return make()
    if not on_first_process():  # it opens its store as it is made
        return DummyLogger()
    import mlflow.tracking  # noqa: F401  # sets the level of its own words, as it is loaded

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells of the tables that it makes
    own = mlflow_arguments(given, folder)
    try:
        made = make(**own)
        assert isinstance(made, MLFlowLogger)
        write_text(folder.mlflow, f"{made.run_id}\n")
    except Exception as error:
        cause = error.__cause__ or error  # Hydra puts its own around what a constructor raises
        if not type(cause).__module__.startswith("mlflow"):
            raise
        raise UserError(
            f"logger=mlflow cannot use '{own['tracking_uri']}' ({one_line(cause)}); "
            "logger.mlflow.tracking_uri is the address of a server, null a file in the run folder."
        ) from None
    return made


def mlflow_arguments(given: Values, folder: RunFolder) -> dict[str, object]:
    """MLflow draws the id of a run, so the folder keeps what it drew; without an address all else lies there, too."""
    address = given.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    store = folder.path.resolve()
    known = folder.mlflow.read_text().strip() if folder.mlflow.is_file() else None
    return {
        "run_name": given.get("run_name") or folder.name,
        "tracking_uri": address or f"sqlite:///{store / 'mlflow.db'}",
        "artifact_location": given.get("artifact_location") or (None if address else (store / "mlflow").as_uri()),
        "run_id": given.get("run_id") or known,
    }


def describe(loggers: Sequence[Logger], folder: RunFolder) -> None:
    """Hand over every key of the configuration, dotted; MLflow takes no key twice, so only what it does not have."""
    if not loggers:
        return
    values = dict(dotted(resolved(folder.config())))
    for logger in loggers:
        known: Values = {}
        if isinstance(logger, MLFlowLogger):
            known = logger.experiment.get_run(str(logger.run_id)).data.params
        logger.log_hyperparams({key: value for key, value in values.items() if key not in known})


def dotted(values: Values, prefix: str = "") -> Iterator[tuple[str, str | int | float]]:
    """``{"a": {"b": [1, 2]}}`` as ``a.b`` and its value; what is neither number nor text as text."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else str(value)
