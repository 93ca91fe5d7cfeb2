"""Jobs that follow from one another: each has a folder of its own, and one that was stopped goes on where it stood."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from selfsight.checkpoints.load import load
from selfsight.composition.catalogue import conf_dir
from selfsight.composition.keys import flat_keys
from selfsight.composition.overrides import compose_with, with_settings
from selfsight.datamodules import DataModule
from selfsight.datamodules.datasets.splits import chosen_labels
from selfsight.engine import build, measure, nodes
from selfsight.engine.about_data import describe
from selfsight.engine.devices import device
from selfsight.engine.options import resolved
from selfsight.engine.outcome import Outcome, headline
from selfsight.engine.stages import export_together
from selfsight.evaluation.base import Figures
from selfsight.jobs.launch import run_nested_job
from selfsight.reporting.tables import singles_of
from selfsight.runs import figures, records
from selfsight.runs.console import make_console, make_table
from selfsight.runs.folder import RunFolder

#: the key under which a job is told which run it starts from
SOURCE = {"pretrain": "init_from", "finetune": "run", "distill": "teacher"}


def perform(
    job: str, words: Sequence[str], folder: Path, settings: Mapping[str, object], *, begun: DictConfig | None = None
) -> Figures:
    """The summary of a job's run in ``folder``: done now, gone on with, or found finished there.

    Args:
        words: as on the command line.
        settings: further keys of the configuration, set after the words.
        begun: the configuration that they are set in, in place of one of words.
    """
    run = RunFolder(folder)
    if run.summary.is_file():
        return run.read_summary()
    if run.checkpoint.is_file():
        cfg = compose_with(job, [f"resume={folder}"], {})
    else:
        shutil.rmtree(folder, ignore_errors=True)  # begun, and stopped before the first checkpoint
        settings = {**settings, "runs": str(folder.parent), "name": folder.name}
        cfg = compose_with(job, words, settings) if begun is None else with_settings(begun.copy(), settings)
    run_nested_job(job, cfg)
    return run.read_summary()


def check(cfg: DictConfig, data: DataModule) -> None:
    """Refuse labels that the steps of ``cfg.then`` would refuse later.

    Raises:
        UserError: see `chosen_labels`.
    """
    if "then" in cfg:
        chosen_labels(data.data.train, resolved(cfg.labels), data.data.classes)


def follow(cfg: DictConfig, folder: RunFolder) -> Outcome:
    """The stages of a multistage training, or the steps that ``cfg.then`` names, each from the run before it.

    They lie in folders inside the run's folder.

    Returns:
        Headline figures of the last step, or of all stages together.
    """
    if "then" not in cfg:
        return further_stages(cfg, folder)
    source, summary = folder.path, folder.read_summary()
    for name, step in cfg.then.items():
        settings = {
            SOURCE[step.job]: str(source),
            "seed": cfg.seed,
            "labels": cfg.labels,
            "trainer.accelerator": cfg.trainer.accelerator,
            "limit_images": cfg.get("limit_images"),
        }
        if not any(word.startswith("debug=") for word in step.words):
            settings |= shrunk(cfg)
        source = folder.path / str(name)
        summary = perform(step.job, step.words, source, settings)
    return Outcome(headline(summary), folder)


def further_stages(cfg: DictConfig, folder: RunFolder) -> Outcome:
    """The same training in batches from within what the stages before find alike, and all of them as one backbone.

    Stage i lies in ``stage<i>``, the backbone in ``stages``, and its figures in ``eval/stages.json``.
    """
    multistage = nodes.build(cfg.batches)
    if not multistage.leads:  # one of them
        return Outcome(headline(folder.read_summary()), folder)
    runs = [folder]
    for i in range(1, multistage.stages):
        run = RunFolder(folder.path / f"stage{i}")
        earlier = [str(one.path) for one in runs]
        perform("pretrain", (), run.path, {"batches.runs": earlier, "resume": None, "extend": None}, begun=cfg)
        runs.append(run)
    return stages_together(cfg, folder, runs)


def stages_together(cfg: DictConfig, folder: RunFolder, runs: Sequence[RunFolder]) -> Outcome:
    """Figures of the features of all stages side by side; shown beside those of each, and kept."""
    place = export_together([run.path for run in runs], folder.path / "stages")
    evaluators = {str(name): build.evaluator(node) for name, node in (cfg.evaluator.get("final") or {}).items()}
    if not evaluators:
        return Outcome(headline(folder.read_summary()), folder)
    network = load(place).to(device(cfg.trainer.accelerator))
    data = build.datamodule(cfg, folder)
    chosen = measure.select_evaluators(evaluators, data)
    together = measure.run_evaluators(chosen, network, data, measure.features(network, data))
    rows = {f"stage {i}": run.read_summary()["pretrained"] for i, run in enumerate(runs)} | {"all stages": together}
    console, columns = make_console(), figures.singles(rows.values())
    lines = ([title, *singles_of(row, columns)] for title, row in rows.items())
    console.print(make_table("", *columns.values(), rows=lines))
    console.print(f"backbone of all stages: {place}", markup=False)
    record = {
        "protocol": "features of all stages side by side, divided by their norm; as those of the table",
        "data": describe(data.data),
        "settings": {"batches": OmegaConf.to_container(cfg.batches, resolve=True)},
        "result": {title: {key: row[key] for key in columns if key in row} for title, row in rows.items()},
    }
    records.write(folder.path / records.FOLDER / "stages.json", record)
    return Outcome(headline({"pretrained": together}), folder)


def shrunk(cfg: DictConfig) -> dict[str, object]:
    """The values of the choice of ``debug`` that the run was made with, by key: its steps are to be as short."""
    if cfg.get("debug") is None:
        return {}
    debug = OmegaConf.load(conf_dir() / "debug" / f"{cfg.debug}.yaml")
    found = {key: OmegaConf.select(debug, key) for key in flat_keys(debug)}
    return {key: value for key, value in found.items() if not isinstance(value, DictConfig)}
