"""What the command line offers: jobs, groups, and the choices of each over the whole search path.

The search path is the package's own `conf`, the folders of installed plug-ins, and the folders that the person names:
with ``--config-dir``, ``hydra.searchpath`` or the environment variable `PATH_VARIABLE`. It is known without Hydra, so
that help is quick; Hydra is given the same folders.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfsight import plugins
from selfsight.errors import USAGE, UserError, nearest

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
    "evaluate": ("evaluate", "any evaluator on a run's frozen backbone, yours among them"),
    "embed": ("embed", "write the features of every image to a file"),
    "prune": ("prune", "which images to keep: a list to learn from, and a page of what goes"),
    "import": ("import_weights", "anyone's checkpoint as a backbone folder, or as a run that goes on"),
    "export": ("export", "a run's backbone for detectron2, torchvision, timm or ONNX"),
    "replay": ("replay", "do the step again at which a run went wrong, and say which tensor did first"),
    "report": ("report", "write report.html of a run again"),
    "explore": ("explore", "the embedding of a run in a browser: lasso, neighbours, search by image, export"),
    "compare-runs": ("compare_runs", "several runs side by side: table, curves, differences of configuration"),
    "runs": ("runs", "list run folders: what they learned from what, how far they are, how good they got"),
    "prepare": ("prepare", "make a folder of images fast to read, once for all runs"),
    "stats": ("stats", "what the images of a data set are: channels, type, range, mean and std"),
    "profile": ("profile", "where the time of a training step goes, and what holds it up"),
    "backbones": ("backbones", "which kinds of network learn by which methods, told by one step of each"),
    "doctor": ("doctor", "say what works on this machine and what to install for the rest"),
}

#: jobs whose sizes may follow from the number of images, and whose tries bring labels of their own
ADVISED = ("pretrain", "profile")

#: groups that help tells of, in its order
GROUPS = {
    "method": "how it learns",
    "backbone": "the network (anything in timm by name, too)",
    "heads": "what of the features it learns from: all of them, or the first ones as well",
    "dataset": "what it learns from",
    "batches": "which images come together in a batch: any, or those that earlier stages find alike",
    "views": "how images are cropped and altered",
    "optimizer": "how weights move",
    "schedule": "how rates change with the step",
    "evaluator": "how good it is",
    "trainer": "devices, precision, length",
    "callbacks": "what else happens while it trains",
    "logger": "where numbers go besides metrics.csv",
    "presets": "values verified for a data set and a method, taken where they are both chosen",
    "recipe": "a whole verified run by name",
    "hparams": "what a sweep with hydra/sweeper=optuna tries",
    "debug": "shrinks any run",
}

#: groups of which several choices may be made at once
SEVERAL = ("callbacks", "logger")

#: jobs that take folders without a key, and the key that gets them
POSITIONAL = {"compare-runs": "runs", "backbones": "families", "runs": "folders"}

#: jobs that take what another one takes
LIKE = {"profile": "pretrain"}

#: keys of the job that another one is like, which mean nothing to it
WITHOUT = {"profile": ("resume", "extend")}

#: the whole evaluation of a run, and the evaluators that can stand alone in its place: those that look at features
WHOLE_EVALUATION = "default"
ON_FEATURES = (
    "clustering", "diagnostics", "episodes", "few_shot", "knn", "linear", "linear_sgd", "logistic_cv", "retrieval",
)  # fmt: skip

#: further folders of the search path, separated as those of PATH; processes that a command starts are told by it, too
PATH_VARIABLE = "SELFSIGHT_CONFIG_PATH"

Content = dict[str, Any]


class Source(NamedTuple):
    """A folder of the search path, and who brings it."""

    provider: str
    folder: Path


# --- the search path -------------------------------------------------------------------------------------------------


def conf_dir() -> Path:
    """Folder of the configuration files, wherever the package is installed."""
    return _package_folder("selfsight.conf")


def search_path() -> tuple[Source, ...]:
    """The folders in which choices are looked for: the package's, those of plug-ins, the person's.

    Raises:
        UserError: a plug-in's module is not there, or two plug-ins have one name.
    """
    brought = [(plugin.name, plugin.conf_dir()) for plugin in plugins.installed()]
    return (
        Source("main", conf_dir()),
        *(Source(f"plug-in {name}", folder.resolve()) for name, folder in brought if folder is not None),
        *(Source("command-line", Path(folder)) for folder in own_folders()),
    )


def own_folders() -> list[str]:
    """The folders that the person has added."""
    return [folder for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]


@contextlib.contextmanager
def searching(places: Sequence[str]) -> Iterator[None]:
    """Further folders of the search path while this lasts, in processes that are started meanwhile, too.

    Args:
        places: folders, ``file://FOLDER`` or ``pkg://PACKAGE``.

    Raises:
        UserError: there is no such folder.
    """
    before = os.environ.get(PATH_VARIABLE)
    folders = [*own_folders(), *(str(_folder_of(place)) for place in places)]
    if folders:
        os.environ[PATH_VARIABLE] = os.pathsep.join(dict.fromkeys(folders))
    try:
        yield
    finally:
        os.environ.pop(PATH_VARIABLE, None)
        if before is not None:
            os.environ[PATH_VARIABLE] = before


def _folder_of(place: str) -> Path:
    scheme, separator, rest = place.partition("://")
    if separator and scheme == "pkg":
        try:
            return _package_folder(rest.replace("/", "."))
        except ImportError:
            raise UserError(f"'{place}' names no package that holds configurations.", status=USAGE) from None
    folder = Path(rest if separator else place).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"'{place}' is no folder; --config-dir names one with configurations of yours.", status=USAGE)
    return folder


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(name)
    return Path(next(iter(spec.submodule_search_locations))).resolve()


# --- files -----------------------------------------------------------------------------------------------------------


def content(path: Path) -> Content:
    """What a YAML file of a configuration holds; its references as they are written.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return _content(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}).", status=USAGE) from None


@functools.lru_cache(maxsize=1024)
def _content(path: Path, changed: int) -> Content:
    import yaml

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' cannot be read as YAML ({reason}).", status=USAGE) from None
    if not isinstance(found, dict | None):
        raise UserError(f"'{path}' is no configuration: keys with values were expected.", status=USAGE)
    return found or {}


def files(group: str, name: str) -> list[Source]:
    """The files of a choice, each with its provider; of an unknown one none."""
    places = (Source(provider, folder / group / f"{name}.yaml") for provider, folder in search_path())
    return [Source(provider, path) for provider, path in places if path.is_file()]


def file(group: str, name: str) -> Path:
    """The file of a choice.

    Raises:
        UserError: there is none, or two folders of the search path have one of that name.
    """
    found = files(group, name)
    if not found:
        raise UserError(f"there is no {group} '{name}'.", status=USAGE)
    if len(found) > 1:
        both = " and ".join(str(path) for _, path in found)
        raise UserError(f"{group}={name} is in two places, {both}; give yours another name.", status=USAGE)
    return found[0].folder


def primary(name: str) -> Path:
    """The file of a job's configuration, or of a person's own in its place (``--config-name``).

    Raises:
        UserError: there is none.
    """
    found = [folder / f"{name}.yaml" for _, folder in search_path() if (folder / f"{name}.yaml").is_file()]
    if not found:
        names = [path.stem for _, folder in search_path() for path in folder.glob("*.yaml")]
        raise UserError(
            f"there is no configuration '{name}'; --config-dir says in which folder.{nearest(name, names)}",
            status=USAGE,
        )
    return found[0]


# --- defaults lists --------------------------------------------------------------------------------------------------


class Default(NamedTuple):
    """An entry of a defaults list: ``group`` is None for a configuration that is taken in whole."""

    group: str | None
    choice: object


def defaults(path: Path) -> list[Default]:
    """The defaults list of a file, without what it says of Hydra itself."""
    found = []
    for entry in content(path).get("defaults") or []:
        if isinstance(entry, dict):
            (key, choice), *_ = entry.items()
            group = str(key).removeprefix("override ").removeprefix("optional ").strip().lstrip("/").partition("@")[0]
            if not group.startswith("hydra/"):
                found.append(Default(group, choice))
        elif isinstance(entry, str) and entry != "_self_":
            found.append(Default(None, entry.lstrip("/").partition("@")[0]))
    return found


def chain(job: str) -> list[Path]:
    """The files that a job's configuration consists of, without groups: those it takes in, then its own."""
    path = primary(job)
    inner = [name for group, name in defaults(path) if group is None]
    return [*(file for name in inner for file in chain(str(name))), path]


def job_of(name: str) -> str:
    """The job whose configuration has this name: itself, or the one that a person's own configuration begins with.

    Raises:
        UserError: it begins with none.
    """
    if name in JOBS:
        return name
    found = content(primary(name)).get("job") or next((p.stem for p in reversed(chain(name)) if p.stem in JOBS), None)
    if found not in JOBS:
        raise UserError(
            f"the configuration '{name}' belongs to no job; begin its defaults with that of one: `- pretrain`.",
            status=USAGE,
        )
    return str(found)


def job_groups(job: str) -> dict[str, object]:
    """The groups of a job, those of `GROUPS` first, each with its default; None where none has to be chosen."""
    found: dict[str, object] = {}
    for path in chain(job):
        found |= {group: choice for group, choice in defaults(path) if group is not None}
    return {
        group: found[group] for group in [*(g for g in GROUPS if g in found), *(g for g in found if g not in GROUPS)]
    }


def evaluates_while_training(job: str) -> bool:
    """Whether a job's evaluator is the whole of them, while training and at the end."""
    return bool(job_groups(job).get("evaluator") == WHOLE_EVALUATION)


# --- choices ---------------------------------------------------------------------------------------------------------


def choices(group: str, job: str | None = None) -> list[str]:
    """Names that ``group=`` takes; where a job is named, those that are made for it."""
    names: set[str] = set()
    for _, folder in search_path():
        names |= {
            path.relative_to(folder / group).with_suffix("").as_posix() for path in (folder / group).rglob("*.yaml")
        }
    return sorted(name for name in names if job is None or _made_for(job, group, name))


def is_own_group(name: str) -> bool:
    """Whether a name is that of a group which the search path has and the package has not."""
    return "." not in name and not (conf_dir() / name).is_dir() and bool(choices(name))


def _made_for(job: str, group: str, name: str) -> bool:
    if group == "recipe":
        job = job_of(job)
        return recipe_job(name) in (None, LIKE.get(job, job))
    if group != "evaluator" or not (conf_dir() / group / f"{name}.yaml").is_file():
        return True
    if evaluates_while_training(job):
        return name in (WHOLE_EVALUATION, *ON_FEATURES)
    return name != WHOLE_EVALUATION


def recipe_job(name: str) -> str | None:
    """The job a recipe is for; None where it does not say."""
    found = next((content(path).get("job") for _, path in files("recipe", name)), None)
    return None if found is None else str(found)
