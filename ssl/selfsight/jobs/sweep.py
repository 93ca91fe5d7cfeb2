"""``-m``: a job in several combinations, in a row or spread by Hydra's launchers; all, or those Optuna picks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from selfsight.composition.catalogue import job_of, own_folders, searching
from selfsight.composition.overrides import BROUGHT_BY, Composed, as_user_error, engine, finish
from selfsight.engine.optuna_sweep import OPTUNA, OptunaSweep, Tried
from selfsight.errors import USAGE, UserError
from selfsight.jobs.launch import run_nested_job

BASIC = "basic"


@dataclass(frozen=True)
class Task:
    """A job as Hydra's launchers call it, here or in another process: it never fails, so that the others run, too.

    Attributes:
        name: of the job's configuration. folders: that the person has added to the search path. place: where to run.
    """

    name: str
    folders: tuple[str, ...]
    place: str

    def __call__(self, cfg: DictConfig) -> Tried:
        hydra = HydraConfig.get()
        words, choices = list(hydra.overrides.task), dict(hydra.runtime.choices)
        if self.place not in sys.path:
            sys.path.append(self.place)
        try:
            with searching(self.folders):
                final = finish(self.name, Composed(cfg, cast("DictConfig", hydra), choices), words)
                figures = run_nested_job(str(final.job), final, [*self.flags(), *words])
        except UserError as error:
            print(f"selfsight: {error}", file=sys.stderr)
            return Tried(error=str(error))
        except Exception as error:
            traceback.print_exc()
            return Tried(error=f"{type(error).__name__}: {error}")
        return Tried(dict(figures or {}), final.get("objective"))

    def flags(self) -> list[str]:
        """The options that belong to the words of one combination."""
        name = [] if self.name == job_of(self.name) else ["--config-name", self.name]
        return [*(word for folder in self.folders for word in ("--config-dir", folder)), *name]


def sweep(name: str, overrides: Sequence[str]) -> list[Tried]:
    """Every combination, one run after the other or where ``hydra/launcher`` says; with Optuna those that it picks.

    Args:
        name: the job, or a person's own configuration of one. overrides: checked ones.

    Returns:
        What became of each.

    Raises:
        UserError: some of them failed; the others have run.
    """
    hydra, task = engine(name), Task(name, tuple(own_folders()), os.getcwd())
    try:
        master = hydra.compose_config(name, list(overrides), RunMode.MULTIRUN)
        sweeper = master.hydra.runtime.choices["hydra/sweeper"]
        if sweeper == OPTUNA:
            done = list(OptunaSweep.read(master.hydra.sweeper).run(name, hydra, master, task))
        else:
            if sweeper == BASIC:
                refuse_endless(overrides)
            batches = hydra.multirun(name, task, list(overrides)) or []
            done = [(list(one.overrides), one.return_value) for batch in batches for one in batch]
    except (HydraException, OmegaConfBaseException) as error:
        raise missing_package(overrides) or as_user_error(error) from None
    common = set.intersection(*(set(words) for words, _ in done)) if done else set()
    failed = [(" ".join(word for word in words if word not in common), one.error) for words, one in done if one.error]
    if failed:
        lines = "".join(f"\n  {words}: {said}" for words, said in failed)
        raise UserError(f"{len(failed)} of {len(done)} combinations failed:{lines}")
    return [one for _, one in done]


def refuse_endless(overrides: Sequence[str]) -> None:
    """
    Raises:
        UserError: an interval, of which there are no combinations.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_interval_sweep():
            raise UserError(
                f"'{override.input_line}' has no end of values; name some (choice(…), range(…)), or let Optuna pick: "
                "hydra/sweeper=optuna objective=FIGURE.",
                status=USAGE,
            )


def missing_package(overrides: Sequence[str]) -> UserError | None:
    """The sentence on a launcher whose package is not installed; None where that is not it."""
    from importlib.util import find_spec

    for word in overrides:
        package = BROUGHT_BY.get(word)
        if (
            package is not None
            and find_spec(f"hydra_plugins.hydra_{word.partition('=')[2].partition('_')[0]}_launcher") is None
        ):
            return UserError(f"{word} needs a package: pip install {package}.", status=USAGE)
    return None
