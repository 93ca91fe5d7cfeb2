"""What the command line offers: its jobs, the groups of the configuration with their choices, and the help on them.

Light on imports: `selfsight --help` needs nothing else.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

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
    "import": ("import_weights", "anyone's checkpoint as a backbone folder, or as a run that goes on"),
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

#: jobs that take what another one takes
LIKE = {"profile": "pretrain"}

#: the whole evaluation of a run, and the evaluators that can stand alone in its place: those that look at features
WHOLE_EVALUATION = "default"
ON_FEATURES = (
    "clustering", "diagnostics", "episodes", "few_shot", "knn", "linear", "linear_sgd", "logistic_cv", "retrieval",
)  # fmt: skip


def conf_dir() -> Path:
    """Folder of the configuration files, wherever the package is installed."""
    spec = importlib.util.find_spec("selfsight.conf")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def job_text(job: str) -> str:
    return (conf_dir() / f"{job}.yaml").read_text(encoding="utf-8")


def job_groups(job: str) -> dict[str, str]:
    """The groups of a job, in the order of `GROUPS`, each with its default; ``null`` where none has to be chosen."""
    found: dict[str, str] = dict(re.findall(r"^  - (\w+): (\S+)", job_text(job), flags=re.M))
    return {group: found[group] for group in GROUPS if group in found}


def choices(group: str, job: str | None = None) -> list[str]:
    """Names that ``group=`` takes; where a job is named, those that are made for it."""
    folder = conf_dir() / group
    names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    if job is not None and group == "recipe":
        return [name for name in names if recipe_job(name) == LIKE.get(job, job)]
    if job is not None and group == "evaluator":
        whole = job_groups(job).get(group) == WHOLE_EVALUATION
        return [
            name for name in names if (name in (WHOLE_EVALUATION, *ON_FEATURES) if whole else name != WHOLE_EVALUATION)
        ]
    return names


def recipe_job(name: str) -> str | None:
    """The job a recipe is for: its file begins with the command."""
    text = (conf_dir() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    command = re.search(r"^# selfsight ([\w-]+) ", text, flags=re.M)
    return command and command[1]


def wrapped(words: list[str], indent: int, width: int = 100) -> str:
    return textwrap.fill("  ".join(words), width, initial_indent=" " * indent, subsequent_indent=" " * indent).lstrip()


def groups_help(names: Iterable[str], job: str | None = None) -> str:
    lines = []
    for group in names:
        lines.append(f"  {group:<10} {GROUPS[group]}")
        found = choices(group, job)
        if found:
            lines.append(" " * 13 + wrapped(found, 13))
    return "\n".join(lines)


def help_text() -> str:
    jobs = "\n".join(f"  {name:<12} {line}" for name, (_, line) in JOBS.items())
    return (
        "selfsight: self-supervised and semi-supervised pretraining for images\n\n"
        "usage: selfsight <job> [group=choice …] [key=value …] [-m for every combination of a,b,c]\n\n"
        f"jobs (selfsight <job> --help says more)\n{jobs}\n\n"
        f"groups and their choices\n{groups_help(GROUPS)}\n\n"
        "examples\n"
        "  selfsight pretrain\n"
        "  selfsight pretrain method=swav backbone=resnet50 dataset=folder dataset.root=photos\n"
        "  selfsight pretrain -m method=simclrv2,swav seed=0,1,2\n"
        "  selfsight knn run=runs/simclrv2-digits-1\n"
    )


def job_help(job: str) -> str:
    text = job_text(job)
    shared = job_text("frozen") if "- frozen\n" in text else ""
    about = [line.lstrip("# ") for line in text.split("\ndefaults:")[0].splitlines() if line.startswith("#")]
    used = job_groups(job)
    lines = (shared + text).splitlines()
    keys = [line for line in lines if line[:1].isalpha() and not line.startswith(("defaults:", "hydra:"))]
    parts = ["\n".join(about)]
    if used:
        parts.append("groups and their choices\n" + groups_help(used, job))
    if keys:
        parts.append("keys and their defaults\n" + "\n".join("  " + key for key in keys))
    return "\n\n".join(parts) + "\n"
