"""`selfsight <job> key=value …`: finds the job, checks every word typed, composes the configuration, runs.

Light on imports: `selfsight --help` loads neither torch nor Hydra.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsight.errors import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: name: (module in selfsight.jobs, one line of help)
JOBS = {
    "pretrain": ("pretrain", "learn a backbone from images (no arguments: SimCLR on handwritten digits)"),
    "finetune": ("finetune", "train a pretrained network on few labels"),
    "distill": ("distill", "teach a network what a fine-tuned one answers for all images"),
    "compare": ("compare", "what few labels are worth: one table of approaches, numbers of labels and seeds"),
    "knn": ("evaluate", "k-nearest-neighbour accuracy of a run's frozen backbone"),
    "linear": ("evaluate", "linear-probe accuracy of a run's frozen backbone"),
    "retrieval": ("evaluate", "recall@k and mean average precision of searching by image"),
    "cluster": ("evaluate", "k-means on the features against the labels"),
    "episodes": ("evaluate", "few-shot episodes on the features"),
    "dense": ("evaluate", "segmentation from frozen feature maps"),
    "detect": ("detect", "fine-tune a detector on a run's backbone: Faster or Mask R-CNN, COCO's AP"),
    "invariance": ("evaluate", "how far each augmentation moves the features"),
    "diagnostics": ("evaluate", "collapse and quality without labels"),
    "embed": ("embed", "write the features of every image to a file"),
    "export": ("export", "a run's backbone for detectron2, torchvision, timm or ONNX"),
    "report": ("report", "write report.html of a run again"),
    "explore": ("explore", "the embedding of a run in a browser: lasso, neighbours, search by image, export"),
    "compare-runs": ("compare_runs", "several runs side by side: table, curves, differences of configuration"),
    "prepare": ("prepare", "make a folder of images fast to read, once for all runs"),
    "profile": ("profile", "where the time of a training step goes, and what holds it up"),
    "doctor": ("doctor", "say what works on this machine and what to install for the rest"),
}

GROUPS = {
    "method": "how it learns",
    "backbone": "the network (any timm CNN by name, too)",
    "dataset": "what it learns from",
    "views": "how images are cropped and altered",
    "optimizer": "how weights move",
    "schedule": "how rates change with the step",
    "evaluator": "how good it is",
    "trainer": "devices, precision, length",
    "logger": "where numbers go besides metrics.csv",
    "recipe": "a whole verified run by name",
    "debug": "shrinks any run",
}

#: jobs that take folders without a key, and the key that gets them
POSITIONAL = {"compare-runs": "runs"}

#: put before a value's key that has the name of a group: Hydra would look for a choice there (knn backbone=DIR)
ASIDE = "_"

USAGE = 2  # exit status for a wrong word on the command line


def conf_dir() -> Path:
    """Folder of the configuration files, wherever the package is installed."""
    spec = importlib.util.find_spec("selfsight.conf")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def choices(group: str) -> list[str]:
    """Names that ``group=`` takes."""
    folder = conf_dir() / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def wrapped(words: list[str], indent: int, width: int = 100) -> str:
    import textwrap

    return textwrap.fill("  ".join(words), width, initial_indent=" " * indent, subsequent_indent=" " * indent).lstrip()


def groups_help(names: Iterator[str] | list[str]) -> str:
    lines = []
    for group in names:
        lines.append(f"  {group:<10} {GROUPS[group]}")
        found = choices(group)
        if found:
            lines.append(" " * 13 + wrapped(found, 13))
    return "\n".join(lines)


def help_text() -> str:
    jobs = "\n".join(f"  {name:<12} {line}" for name, (_, line) in JOBS.items())
    return (
        "selfsight: self-supervised and semi-supervised pretraining for images\n\n"
        "usage: selfsight <job> [group=choice …] [key=value …] [-m for every combination of a,b,c]\n\n"
        f"jobs (selfsight <job> --help says more)\n{jobs}\n\n"
        f"groups and their choices\n{groups_help(list(GROUPS))}\n\n"
        "examples\n"
        "  selfsight pretrain\n"
        "  selfsight pretrain method=swav backbone=resnet50 dataset=folder dataset.root=photos\n"
        "  selfsight pretrain -m method=simclrv2,swav seed=0,1,2\n"
        "  selfsight knn run=runs/simclrv2-digits-1\n"
    )


def job_help(job: str) -> str:
    text = (conf_dir() / f"{job}.yaml").read_text()
    shared = (conf_dir() / "frozen.yaml").read_text() if "- frozen\n" in text else ""
    about = [line.lstrip("# ") for line in text.split("\ndefaults:")[0].splitlines() if line.startswith("#")]
    used = [g for g in GROUPS if f"- {g}:" in text]
    lines = (shared + text).splitlines()
    keys = [line for line in lines if line[:1].isalpha() and not line.startswith(("defaults:", "hydra:"))]
    parts = ["\n".join(about)]
    if used:
        parts.append("groups and their choices\n" + groups_help(used))
    if keys:
        parts.append("keys and their defaults\n" + "\n".join("  " + key for key in keys))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run(words)
    except UserError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("selfsight: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return
    if words[0] == "--version":
        from selfsight import __version__

        print(__version__)
        return
    job, overrides = words[0], words[1:]
    if job not in JOBS:
        raise UserError(f"there is no job '{job}'; the jobs are {', '.join(JOBS)}.{nearest(job, JOBS)}", status=USAGE)
    if any(word in ("-h", "--help") for word in overrides):
        print(job_help(job), end="")
        return
    if job in POSITIONAL and (folders := [word for word in overrides if "=" not in word and not word.startswith("-")]):
        quoted = ",".join(f"'{folder}'" for folder in folders)
        overrides = [*(word for word in overrides if word not in folders), f"{POSITIONAL[job]}=[{quoted}]"]
    multirun = [word for word in overrides if word in ("-m", "--multirun")]
    overrides = [word for word in overrides if word not in ("-m", "--multirun")]
    if flags := [word for word in overrides if word.startswith("-")]:
        raise UserError(
            f"'{flags[0]}' is no option; options are -m and --help, everything else is key=value.", status=USAGE
        )
    overrides = checked(job, overrides, sweep=bool(multirun))
    if multirun:
        launch_multirun(job, overrides)
    else:
        start(job, compose(job, overrides))


def start(job: str, cfg: DictConfig) -> None:
    from omegaconf import OmegaConf, open_dict

    with open_dict(cfg):
        for key in [key for key in GROUPS if f"{ASIDE}{key}" in cfg]:
            cfg[key] = cfg.pop(f"{ASIDE}{key}")

    def holder(key: str) -> Any:
        return OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg

    # OmegaConf.missing_keys would resolve references to a data set that only the job will fill in.
    if missing := sorted(key for key in flat_keys(cfg) if OmegaConf.is_missing(holder(key), key.rpartition(".")[2])):
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=VALUE.", status=USAGE)
    if cfg.get("job", job) != job:
        raise UserError(f"this recipe is one for `selfsight {cfg.job}`.", status=USAGE)
    importlib.import_module(f"selfsight.jobs.{JOBS[job][0]}").run(cfg)


def compose(job: str, overrides: list[str]) -> DictConfig:
    """The configuration of a job; a mistake in it is a `UserError` of one line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=job):
            return hydra_compose(job, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(" ".join(str(cause).split()), status=USAGE) from None


def checked(job: str, overrides: list[str], *, sweep: bool) -> list[str]:
    """The overrides, each word of them known; otherwise one sentence with the nearest right one.

    ``backbone=<timm name>`` becomes the choice ``timm`` with that name; ``group=null`` leaves an optional group empty.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    primary = (conf_dir() / f"{job}.yaml").read_text()
    groups = [g for g in GROUPS if f"- {g}:" in primary]
    parser = OverridesParser.create()
    group_words: list[str] = []
    value_words: list[tuple[str, str, Any]] = []
    for word in overrides:
        try:
            override = parser.parse_override(word)
        except HydraException:
            raise UserError(f"'{word}' is not of the form key=value.", status=USAGE) from None
        key = override.key_or_group
        if override.is_sweep_override() and not sweep:
            raise UserError(f"'{word}' names several values; -m runs every combination.", status=USAGE)
        if key in groups and not override.is_delete():
            group_words.extend(group_choice(key, word, override))
        elif key.startswith("hydra") or override.is_add() or override.is_force_add() or override.is_delete():
            group_words.append(word)
        else:
            value_words.append((key, word, override))
    first = [w.split(",")[0] if "=" in w and w.split("=")[0] in groups else w for w in group_words]
    own = own_values(job, first, {key for key, _, _ in value_words})
    if own and any(word.startswith("optimizer=") and "," in word for word in group_words):
        raise UserError(
            "optimizer= names several here, and method or data set come with values for one; try them one by one.",
            status=USAGE,
        )
    targets = [word for key, word, _ in value_words if key.endswith("._target_")]  # they say which keys there are
    cfg = compose(job, first + targets) if value_words else None
    words = []
    for key, word, override in value_words:
        assert cfg is not None
        if known_key(cfg, key, groups):
            check_type(cfg, key, override)
            words.append(f"+{ASIDE}{word}" if key in GROUPS else word)
        else:
            words.append(f"+{word}")
    return group_words + own + words


def own_values(job: str, words: list[str], given: set[str]) -> list[str]:
    """Words that give an optimiser chosen by name the values of its own file.

    Without them it would be left with those that method, tuned values or recipe name for another optimiser.

    Args:
        words: the groups chosen. given: keys that the user sets.
    """
    import json

    from omegaconf import OmegaConf

    name = next((word.split("=")[1] for word in words if word.startswith("optimizer=")), None)
    if name is None:
        return []
    own: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optimizer" / f"{name}.yaml"))
    found: Any = OmegaConf.to_container(compose(job, words).optimizer)
    wanted = {**dict.fromkeys(found), **own}
    changed = {f"optimizer.{key}": value for key, value in wanted.items() if found.get(key) != value}
    return [f"{key}={json.dumps(value)}" for key, value in changed.items() if key not in given]


def group_choice(group: str, word: str, override: Any) -> list[str]:
    known = choices(group)
    values = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else [override.value()]
    if values == [None] or values == ["null"]:
        return [] if group in ("recipe", "debug") else [f"~{group}"]
    unknown = [str(v) for v in values if str(v) not in known]
    if not unknown:
        return [word]
    if group == "backbone":
        from selfsight.backbones.registry import create, is_known  # noqa: F401  (the import registers ours)

        if all(is_known(name) for name in unknown):
            if len(values) > 1:
                raise UserError(
                    f"backbone={unknown[0]} is a timm name and cannot be swept beside others; "
                    f"use backbone=timm backbone.name={','.join(values)}.",
                    status=USAGE,
                )
            return ["backbone=timm", f"backbone.name={unknown[0]}"]
        import timm

        known = [*known, *timm.list_models()]
        raise UserError(
            f"there is no backbone '{unknown[0]}', neither here nor in timm.{nearest(unknown[0], known)}", status=USAGE
        )
    raise UserError(
        f"there is no {group} '{unknown[0]}'; choose from {', '.join(known)}.{nearest(unknown[0], known)}", status=USAGE
    )


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from flat_keys(child, f"{prefix}{key}.")


def known_key(cfg: Any, key: str, groups: list[str]) -> bool:
    """Whether the configuration has ``key``; False where the thing configured would take it all the same.

    Raises:
        UserError: neither; names the nearest key.
    """
    from omegaconf import OmegaConf

    keys = list(flat_keys(cfg))
    if key in keys:
        return True
    parent, _, leaf = key.rpartition(".")
    arguments = arguments_of(OmegaConf.select(cfg, parent) if parent in keys else None)
    if leaf in arguments:
        return False
    keys += [f"{parent}.{name}" for name in arguments]
    close = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.6)
    close = close or [k for k in keys if k.rpartition(".")[2] == leaf][:1]
    close = close or difflib.get_close_matches(leaf, keys, n=1, cutoff=0.5)
    raise UserError(f"there is no key '{key}'." + (f" Did you mean '{close[0]}'?" if close else ""), status=USAGE)


def arguments_of(node: Any) -> list[str]:
    """Names of the arguments that the ``_target_`` of a node takes."""
    import inspect

    from hydra.utils import get_object
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig) or "_target_" not in node:
        return []
    return [name for name in inspect.signature(get_object(node._target_)).parameters if name not in ("self", "kwargs")]


def check_type(cfg: Any, key: str, override: Any) -> None:
    """Refuse a word where a number stands, and anything but true and false for a switch."""
    from omegaconf import DictConfig, OmegaConf

    parent, _, leaf = key.rpartition(".")
    holder = OmegaConf.select(cfg, parent) if parent else cfg
    node = holder._get_node(leaf)
    if override.is_sweep_override() or node is None or node._is_interpolation() or node._is_missing():
        return
    old, new = None if isinstance(node, DictConfig) else node._value(), override.value()
    if isinstance(old, bool) and not isinstance(new, bool) and new != "auto":
        raise UserError(f"{key} is '{new}'; true or false was expected.", status=USAGE)
    if isinstance(old, (int, float)) and not isinstance(old, bool) and isinstance(new, str) and "${" not in new:
        raise UserError(f"{key} is '{new}'; a number was expected.", status=USAGE)


def launch_multirun(job: str, overrides: list[str]) -> None:
    """Every combination, one run after the other or as SLURM jobs (hydra/launcher=submitit_slurm)."""
    import hydra

    def task(cfg: DictConfig) -> None:
        try:
            start(job, cfg)
        except UserError as error:
            print(f"selfsight: {error}", file=sys.stderr)
            sys.exit(error.status)

    sys.argv = [sys.argv[0], "--multirun", *overrides]
    hydra.main(config_path=str(conf_dir()), config_name=job, version_base="1.3")(task)()


if __name__ == "__main__":
    main()
