"""What a command can do, told without doing it: ``--help``, ``--cfg``, ``--info``, and what the shell completes."""

from __future__ import annotations

import inspect
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfsight.composition import catalogue
from selfsight.composition.catalogue import GROUPS, JOBS, chain, choices, job_groups, primary
from selfsight.errors import USAGE, UserError

#: what ``--info`` tells of
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


# --- help ------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """What ``selfsight --help`` prints."""
    jobs = "\n".join(f"  {name:<12} {line}" for name, (_, line) in JOBS.items())
    return (
        "selfsight: self-supervised and semi-supervised pretraining for images\n\n"
        "usage: selfsight <job> [group=choice …] [key=value …] [-m for every combination of a,b,c]\n\n"
        f"jobs (selfsight <job> --help says more)\n{jobs}\n\n"
        f"groups and their choices\n{groups_help([group for group in GROUPS if choices(group)])}\n\n"
        "Hydra's options\n"
        "  --cfg job|hydra|all     print the configuration and stop (--resolve, --package KEY)\n"
        "  --info [what]           how it is composed: defaults, defaults-tree, searchpath, plugins, config\n"
        "  --config-dir DIR        a folder with choices of your own\n"
        "  --config-name NAME      a configuration of your own in the place of the job's\n"
        "  -m, --multirun          a sweep: a,b,c  choice(…) range(…) glob(…); interval(…) with hydra/sweeper=optuna\n"
        '  -sc install=bash        completion: eval "$(selfsight -sc install=bash)"\n\n'
        "examples\n"
        "  selfsight pretrain\n"
        "  selfsight pretrain method=swav backbone=resnet50 dataset=folder dataset.root=photos\n"
        "  selfsight pretrain -m method=simclrv2,swav seed=0,1,2\n"
        "  selfsight pretrain method=swav --help\n"
        "  selfsight knn run=runs/simclrv2-digits-1\n"
    )


def groups_help(names: Iterable[str], job: str | None = None) -> str:
    """Groups, each with a line on it and its choices."""
    lines = []
    for group in names:
        lines.append(f"  {group:<10} {GROUPS.get(group, '')}".rstrip())
        found = choices(group, job)
        if found:
            lines.append(" " * 13 + wrapped(found, 13))
    return "\n".join(lines)


def wrapped(words: list[str], indent: int, width: int = 100) -> str:
    return textwrap.fill("  ".join(words), width, initial_indent=" " * indent, subsequent_indent=" " * indent).lstrip()


def job_help(job: str) -> str:
    """What ``selfsight JOB --help`` prints: about it, its groups, its keys with their defaults and comments."""
    shown = [group for group in job_groups(job) if group in GROUPS or catalogue.is_own_group(group)]
    keys = dict(entry for path in chain(job) for entry in key_lines(path))
    keys = {key: line for key, line in keys.items() if key not in catalogue.WITHOUT.get(catalogue.job_of(job), ())}
    parts = [about(primary(job))]
    if shown:
        parts.append("groups and their choices\n" + groups_help(shown, job))
    if keys:
        parts.append("keys and their defaults\n" + "\n".join(f"  {line}" for line in keys.values()))
    return "\n\n".join(parts) + "\n"


def about(path: Path) -> str:
    """The comment that a file begins with."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            found.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(found)


def key_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The keys at the top of a file, each with its line as it is written, comment included."""
    import yaml

    text = path.read_text(encoding="utf-8")
    lines, root = text.splitlines(), yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for key, _ in root.value if root is not None else ():
        if key.value not in ("defaults", "hydra", "job"):
            yield key.value, lines[key.start_mark.line]


def choice_help(job: str, words: Sequence[str]) -> str:
    """What ``selfsight JOB method=swav --help`` adds: every key of the parts that are chosen, with its value."""
    from omegaconf import DictConfig, OmegaConf

    from selfsight.composition.overrides import compose

    cfg = compose(job, words)
    parts = []
    for word in words:
        group, _, choice = word.lstrip("+").partition("=")
        node = cfg.get(group)
        if group in job_groups(job) and isinstance(node, DictConfig):
            told = dict(described(node))
            lines = OmegaConf.to_yaml(node).splitlines()
            parts.append(f"{group}={choice}\n" + "\n".join(f"  {_with_comment(line, told)}" for line in lines))
    return "".join(f"\n{part}\n" for part in parts)


def _with_comment(line: str, told: dict[str, str]) -> str:
    key = line.partition(":")[0]
    return f"{line:<34}  # {told[key]}" if key in told else line


def described(node: Any) -> Iterator[tuple[str, str]]:
    """What the docstring of a part says of its arguments: the first line on each."""
    from selfsight.composition.targets import locate

    if "_target_" not in node:
        return
    found = locate(node._target_)
    texts = [inspect.getdoc(found) or "", inspect.getdoc(found.__init__) or "" if inspect.isclass(found) else ""]
    for text in texts:
        for names, line in re.findall(r"^ {4}(\w+(?:, \w+)*): (.+)$", text, flags=re.M):
            yield from ((name, line) for name in names.split(", "))


# --- configuration ---------------------------------------------------------------------------------------------------


def show_cfg(job: str, words: Sequence[str], kind: str, package: str | None, *, resolve: bool) -> str:
    """What ``--cfg`` prints: the configuration of the job, Hydra's own, or both.

    Raises:
        UserError: a wrong word, or no such part.
    """
    from omegaconf import Container, OmegaConf, open_dict

    from selfsight.composition.overrides import checked, finish, load

    overrides = checked(job, words)
    composed = load(job, overrides)
    shown: Any = OmegaConf.create({})
    with open_dict(shown):
        if kind != "hydra":
            shown = finish(job, composed, overrides)
        if kind != "job":
            with open_dict(shown), open_dict(composed.hydra):
                shown.hydra = composed.hydra
                for told in ("help", "hydra_help"):
                    shown.hydra.pop(told, None)
    if package is not None and package != "_global_":
        shown = OmegaConf.select(shown, package)
        if shown is None:
            raise UserError(f"there is no part '{package}' to print.", status=USAGE)
    if not isinstance(shown, Container):
        return f"{shown}\n"
    head = f"# @package {package}\n" if package is not None else ""
    return head + OmegaConf.to_yaml(shown, resolve=resolve)


def show_info(job: str, words: Sequence[str], kind: str) -> None:
    """Print what ``--info`` is asked for, as Hydra does."""
    from hydra.types import RunMode

    from selfsight.composition.overrides import checked, engine

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        engine(job).show_info(kind, job, checked(job, words), RunMode.RUN)  # it tells by the root of all logs
    finally:
        root.handlers, root.level = handlers, level


# --- completion ------------------------------------------------------------------------------------------------------


def complete(words: Sequence[str]) -> None:
    """``-sc install=SHELL`` and ``uninstall=SHELL`` by Hydra's own scripts, and the ``query=SHELL`` that they make.

    Raises:
        UserError: another word, or a shell that Hydra does not complete in.
    """
    from selfsight.composition.overrides import engine

    command, _, shell = (words[0] if words else "").partition("=")
    plugins = engine("pretrain").get_shell_to_plugin_map(engine("pretrain").config_loader)
    if command not in ("install", "uninstall", "query") or shell not in plugins or len(words) != 1:
        raise UserError(
            f"--shell-completion takes install= or uninstall= and one of {', '.join(sorted(plugins))}.", status=USAGE
        )
    if command != "query":
        return engine("pretrain").shell_completion("pretrain", list(words))
    _, _, rest = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    job, space, line = rest.lstrip().partition(" ")
    if not space or job not in JOBS:
        print("\n".join(name for name in JOBS if name.startswith(job)))
        return None
    os.environ["COMP_LINE"] = f"selfsight {line}"  # to Hydra there are no jobs
    return engine(job).shell_completion(job, list(words))
