"""Sweeps by Optuna: the next combination is picked from the figures of those before (``hydra/sweeper=optuna``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from selfsight.compat import hydra_launcher
from selfsight.composition.overrides import checked
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import write_text
from selfsight.validation import NULL, check_fields, one_of, whole

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import TrialState

OPTUNA = "optuna"
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "qmc": "QMCSampler", "cmaes": "CmaEsSampler"}


@dataclass(frozen=True)
class Tried:
    """What became of one combination.

    Attributes:
        figures: the job's, by name. objective: the one that a sweep goes by. error: why there are none.
    """

    figures: Mapping[str, object] = field(default_factory=dict)
    objective: str | None = None
    error: str | None = None

    def __float__(self) -> float:
        """The figure that a sweep goes by.

        Raises:
            UserError: the job has no such figure, or none at all.
        """
        if self.error is not None:
            raise UserError(self.error)
        if self.objective is None or self.objective not in self.figures:
            known = [name for name, value in self.figures.items() if isinstance(value, (int, float))]
            raise UserError(
                f"objective is '{self.objective}', and the job ends with {', '.join(known) or 'no figures'}."
                f"{nearest(str(self.objective), known)}",
                status=USAGE,
            )
        return float(str(self.figures[self.objective]))


@dataclass(frozen=True)
class OptunaSweep:
    """A sweep in which Optuna picks the next combination from the figures of those before.

    Attributes:
        n_trials: combinations. n_jobs: started together. direction: ``maximize``, ``minimize`` or ``auto``, which
            minimizes a loss. sampler: one of `SAMPLERS`, or a part with a ``_target_``. seed: of the sampler.
        storage, study_name: where a study is kept, to go on with it. params: what is tried, by key.
    """

    n_trials: Annotated[int, whole(1)] = 20
    n_jobs: Annotated[int, whole(1)] = 1
    direction: Annotated[str, one_of("auto", "maximize", "minimize")] = "auto"
    sampler: Any = "tpe"
    seed: Annotated[int | None, NULL | whole(0)] = 0
    storage: str | None = None
    study_name: str | None = None
    params: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "hydra.sweeper.")

    @classmethod
    def read(cls, node: DictConfig) -> OptunaSweep:
        """The settings in ``hydra.sweeper``.

        Raises:
            UserError: one that there is not, or a value that cannot be meant.
        """
        settings: Any = OmegaConf.to_container(node, resolve=True)
        settings.pop("_target_", None)
        known = list(cls.__dataclass_fields__)
        if other := [key for key in settings if key not in known]:
            raise UserError(f"there is no key 'hydra.sweeper.{other[0]}'.{nearest(other[0], known)}", status=USAGE)
        return cls(**settings)

    def run(
        self, name: str, hydra: Hydra, master: DictConfig, task: Callable[[DictConfig], Tried]
    ) -> Iterator[tuple[list[str], Tried]]:
        """Each combination with what became of it, told in a line; the best one is told at the end and kept in a file.

        Raises:
            UserError: no figure is named to go by, there is nothing to try, or Optuna is not installed.
        """
        if master.get("objective") is None:
            raise UserError("say which figure Optuna is to go by: objective=knn_top1.", status=USAGE)
        study = self.study(str(master.objective))
        fixed, space = self.space(name, list(master.hydra.overrides.task))
        launcher = hydra_launcher(hydra, master, task)
        finished = 0
        while finished < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - finished))]
            tried = [[f"{key}={value}" for key, value in trial.params.items()] for trial in trials]
            returned = launcher.launch([[*fixed, *words] for words in tried], initial_job_idx=finished)
            for trial, words, one in zip(trials, tried, returned, strict=True):
                outcome: Tried = one.return_value
                finished += 1
                value = None if outcome.error else float(outcome)
                study.tell(trial, value, state=None if value is not None else _failed())
                print(f"trial {finished}/{self.n_trials}  {'  '.join(words)}  {_told(outcome)}", flush=True)
                yield [*fixed, *words], outcome
        self.conclude(study, str(master.objective), Path(master.hydra.sweep.dir))

    def study(self, objective: str) -> Study:
        """Optuna's study.

        Raises:
            UserError: Optuna is not installed, or there is no such sampler.
        """
        try:
            import optuna
        except ImportError:
            raise UserError(
                "hydra/sweeper=optuna needs a package: pip install 'selfsight[optuna]'.", status=USAGE
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler: Any = self.sampler
        if isinstance(sampler, Mapping):
            from hydra.utils import instantiate

            sampler = instantiate(sampler)
        elif sampler in SAMPLERS:
            sampler = getattr(optuna.samplers, SAMPLERS[sampler])(seed=self.seed)
        else:
            raise UserError(
                f"hydra.sweeper.sampler is '{sampler}'; {', '.join(SAMPLERS)} or a _target_ was expected."
                f"{nearest(str(sampler), SAMPLERS)}",
                status=USAGE,
            )
        down = self.direction == "minimize" or (self.direction == "auto" and objective.endswith("loss"))
        return optuna.create_study(
            sampler=sampler,
            direction="minimize" if down else "maximize",
            storage=self.storage,
            study_name=self.study_name,
            load_if_exists=True,
        )

    def space(self, name: str, typed: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """The words that all combinations share, and what is tried, by key.

        Raises:
            UserError: nothing is.
        """
        keys = {word.lstrip("+~").partition("=")[0] for word in typed}
        ours = [f"{key}={value}" for key, value in self.params.items() if key not in keys]
        overrides = OverridesParser.create().parse_overrides([*checked(name, ours, sweep=True), *typed])
        space = {one.get_key_element(): distribution(one) for one in overrides if one.is_sweep_override()}
        if not space:
            raise UserError(
                "nothing is to be tried; give a key several values, such as 'optimizer.lr=tag(log,interval(0.03,3))'.",
                status=USAGE,
            )
        return [str(one.input_line) for one in overrides if not one.is_sweep_override()], space

    def conclude(self, study: Study, objective: str, place: Path) -> None:
        """Tell the best combination, and keep it as Hydra's own sweepers do."""
        done = [trial for trial in study.trials if trial.value is not None]
        if not done:
            return
        best = study.best_trial
        words = "  ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best of {len(done)}: {words}  {objective} {best.value:.4g}", flush=True)
        found = {"name": OPTUNA, "best_params": best.params, "best_value": best.value, "objective": objective}
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(found)))


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws a key's values from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if override.is_interval_sweep():
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
        return kind(low, high, log=log)
    if override.is_range_sweep() and not sweep.shuffle and sweep.step > 0:
        values = list(sweep.range())
        kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        return kind(values[0], values[-1], step=sweep.step)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _failed() -> TrialState:
    from optuna.trial import TrialState

    return TrialState.FAIL


def _told(outcome: Tried) -> str:
    return "failed" if outcome.error else f"{outcome.objective} {float(outcome):.4g}"
