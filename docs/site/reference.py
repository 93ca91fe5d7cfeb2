"""The reference pages: jobs and choices from the composition, modules from their docstrings.

Nothing here is a list by hand, but for the rooms of the package that have a page.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.composition import catalogue
from selfsight.composition.defaults import complete
from selfsight.composition.help import about
from selfsight.composition.overrides import compose
from selfsight.composition.targets import locate

#: rooms of the package, a page each: what one calls from Python
ROOMS = {
    "selfsight": "runs, weights and features, in a line each",
    "methods": "how a network learns",
    "methods.semi": "how a network learns from few labels",
    "losses": "the equations: tensors in, scalar out",
    "nn": "heads, queues, averages, multi-crop, layers",
    "optim": "optimisers, groups of parameters, schedules",
    "backbones": "networks, and what makes one of any module",
    "checkpoints": "weights of others in, yours out",
    "datamodules": "images, views, batches",
    "datamodules.datasets": "sets of images by name, folders, labels",
    "datamodules.images": "how images are read and held",
    "datamodules.views": "what views of an image are, and what makes them",
    "datamodules.loading": "order, workers, batches",
    "evaluation": "features, and figures on them",
    "evaluation.probes": "figures on frozen features",
    "evaluation.dense": "figures on frozen maps",
    "evaluation.detection": "a detector on the backbone",
    "contracts": "what goes from room to room",
    "errors": "what can be mended",
}
#: groups whose choices are shown as their files state them: their parts have one list of arguments, which stands above
AS_STATED = {
    "views": "selfsight.datamodules.views.View",
    "backbone": "selfsight.backbones.registry.create",
}
#: groups that set values of the whole run
WHOLE_RUNS = ("recipe", "presets", "hparams", "debug")

Row = tuple[str, str, str]
#: a line that is a command; in ``selfsight JOB: …`` the job is told
COMMAND = re.compile(r"selfsight [\w-]+(?: |$)")


def pages(package: Path) -> Iterator[tuple[str, str]]:
    """Every generated page: its path on the site, its text."""
    for folder in ("reference/jobs/", "reference/choices/"):
        yield from pages_of(folder)
    yield from ((place, module_page(place, package)) for place, _ in pages_of("reference/python/"))


@functools.cache
def pages_of(folder: str) -> list[tuple[str, str]]:
    """The generated pages of a folder, in the order of the navigation."""
    if folder == "reference/jobs/":
        return [(f"{folder}{job}.md", job_page(job)) for job in catalogue.JOBS]
    if folder == "reference/choices/":
        return [(f"{folder}{group}.md", group_page(group)) for group in catalogue.GROUPS if catalogue.choices(group)]
    return [(f"{folder}{room}.md", "") for room in ROOMS]


# --- jobs ------------------------------------------------------------------------------------------------------------


def configuration(job: str) -> DictConfig:
    """The configuration of a job as it is when nothing is said; where an evaluator has to be chosen, with one."""
    needs = catalogue.job_groups(job).get("evaluator") == "???"
    return compose(job, ["evaluator=knn"] if needs else [])


def job_page(job: str) -> str:
    """A job: what it is for, its groups with their defaults, every key with its default."""
    cfg = configuration(job)
    groups = {group: default for group, default in catalogue.job_groups(job).items() if catalogue.choices(group)}
    lines = [f"# selfsight {job}", "", prose(about(catalogue.primary(job))), ""]
    if groups:
        lines += ["## Groups", "", "| group | default | what it chooses |", "|---|---|---|"]
        for group, default in groups.items():
            name = f"[`{group}`](../choices/{group}.md)" if group in catalogue.GROUPS else f"`{group}`"
            shown = "to be given" if default == "???" else "–" if default in (None, "null") else f"`{default}`"
            lines.append(f"| {name} | {shown} | {catalogue.GROUPS.get(group, '')} |")
        lines.append("")
    told = {key: text for path in catalogue.chain(job) for key, text in comments(path).items()}
    for group, choice in (cfg.get("choices") or {}).items():
        told |= told_by_choice(str(group), choice)
    lines += ["## Keys", ""]
    parts: dict[str, list[Row]] = {}
    for key, value, text in rows(cfg, told):
        if key.partition(".")[0] not in ("job", "choices"):
            parts.setdefault(key.partition(".")[0] if "." in key else "", []).append((key, value, text))
    for part in sorted(parts, key=bool):
        lines += [f"### {part}", ""] if part else []
        lines += [*table(parts[part]), ""]
    return "\n".join(lines)


# --- choices ---------------------------------------------------------------------------------------------------------


def group_page(group: str) -> str:
    """A group: every choice with its own lines and keys."""
    lines = [
        f"# {group}",
        "",
        f"{catalogue.GROUPS[group][0].upper()}{catalogue.GROUPS[group][1:]}: `{group}=NAME`.",
        "",
    ]
    names = catalogue.choices(group)
    if group in WHOLE_RUNS:
        for name in names:
            lines += [f"## {name}", "", prose(about(catalogue.file(group, name))), ""]
            lines += ["```yaml", OmegaConf.to_yaml(OmegaConf.create(own(group, name))).rstrip(), "```", ""]
        return "\n".join(lines)
    if group in AS_STATED:
        arguments = [(name, default, text) for name, default, text in signature(AS_STATED[group])]
        lines += ["What a choice can set, and the default where it does not:", "", *table(arguments), ""]
    for name in names:
        lines += [f"## {name}", "", prose(about(catalogue.file(group, name))), ""]
        brought = [
            f"`{entry.group}={entry.choice}`"
            for entry in catalogue.defaults(catalogue.file(group, name))
            if entry.group
        ]
        lines += [f"Brings {', '.join(brought)}.", ""] if brought else []
        found = rows(choice(group, name), told_by_choice(group, name))
        lines += [*table([row for row in found if not row[0].endswith("_partial_")]), ""]
    return "\n".join(lines)


def own(group: str, name: str) -> dict[str, Any]:
    """What the file of a choice states, without its defaults list."""
    return {
        key: value
        for key, value in catalogue.content(catalogue.file(group, name)).items()
        if key not in ("defaults", "job")
    }


def choice(group: str, name: str) -> DictConfig:
    """The keys that a choice sets, under the names that they have in a run; complete, but for `AS_STATED`."""
    stated, globally = own(group, name), "@package _global_" in catalogue.file(group, name).read_text(encoding="utf-8")
    cfg = OmegaConf.create(stated if globally else {group: stated})
    if group not in AS_STATED:
        complete(cfg, "evaluate" if group == "evaluator" else "pretrain")
    return cfg


def told_by_choice(group: str, name: object) -> dict[str, str]:
    """What the file of a choice says beside its keys, by the keys' names in a run."""
    found = {}
    for each in name if isinstance(name, list) else [name]:
        for _, path in catalogue.files(group, str(each)):
            globally = "@package _global_" in path.read_text(encoding="utf-8")
            found |= {key if globally else f"{group}.{key}": text for key, text in comments(path).items()}
    return found


# --- keys ------------------------------------------------------------------------------------------------------------


def rows(node: Any, told: dict[str, str], prefix: str = "") -> Iterator[Row]:
    """Every key with its value and what is said of it: beside it in a file, or by a docstring."""
    said = docstring_arguments(str(node["_target_"])) if "_target_" in node else {}
    for name in node:
        key, value = f"{prefix}{name}", node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation() and len(value):
            yield from rows(value, told, f"{key}.")
        elif OmegaConf.is_missing(node, name):
            yield key, "to be given", told.get(key) or said.get(str(name), "")
        else:
            yield key, shown(value), told.get(key) or said.get(str(name), "")


def shown(value: Any) -> str:
    """A value as one types it."""
    held = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
    return f"`{literal(held)}`"


def literal(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {literal(inner)}" for key, inner in value.items()) + "}"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value) or "''"
    )


def table(found: list[Row] | Iterator[Row]) -> list[str]:
    lines = [f"| `{key}` | {value} | {escaped(text)} |" for key, value, text in found]
    return ["| key | default | meaning |", "|---|---|---|", *lines] if lines else []


def comments(path: Path) -> dict[str, str]:
    """What stands behind the keys of a YAML file, by dotted key."""
    import yaml

    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}

    def walk(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = (
                lines[value.end_mark.line - (value.end_mark.column == 0)] if isinstance(value, yaml.ScalarNode) else ""
            )
            _, sign, said = (line or lines[key.start_mark.line]).partition(" # ")
            if sign:
                found[f"{prefix}{key.value}"] = said.strip()
            walk(value, f"{prefix}{key.value}.")

    if (root := yaml.compose(text)) is not None:
        walk(root, "")
    return found


@functools.cache
def docstring_arguments(target: str) -> dict[str, str]:
    """What a docstring says of each argument, in one line."""
    thing = locate(target)
    texts = [inspect.getdoc(thing) or "", inspect.getdoc(thing.__init__) or "" if inspect.isclass(thing) else ""]
    found = {}
    for text in texts:
        for names, said in re.findall(r"^ {4}(\w+(?:, \w+)*): (.+(?:\n {8,}.+)*)$", text, re.M):
            found |= {name: " ".join(said.split()) for name in names.split(", ")}
    return found


def signature(target: str) -> Iterator[Row]:
    """The arguments of a class or function with their defaults."""
    said = docstring_arguments(target)
    for name, argument in inspect.signature(locate(target)).parameters.items():
        if argument.kind is not argument.VAR_KEYWORD:
            default = "to be given" if argument.default is argument.empty else f"`{literal(argument.default)}`"
            yield name, default, said.get(name, "")


# --- text ------------------------------------------------------------------------------------------------------------


def prose(comment: str) -> str:
    """The comment at the head of a file as Markdown: lines that are set in are code, and so are commands."""
    lines, before = [], False
    for line in comment.splitlines():
        code = line.startswith("  ") or bool(COMMAND.match(line))
        if code is not before:
            lines.append("")
        lines.append(f"    {line.removeprefix('  ').rstrip()}" if code else escaped(line))
        before = code
    return "\n".join(lines).strip("\n")


def escaped(text: str) -> str:
    """Text in which no sign means anything to Markdown or HTML, but for what stands between backticks.

    Roles of other libraries' docstrings go: ``:class:`~a.b.C` `` is `` `C` ``.
    """
    text = re.sub(r":\w+:`(?:~[\w.]*\.)?([^`]+)`", r"`\1`", text)
    parts = re.split(r"(``.+?``|`[^`]*`)", text)  # in code a table's bar needs no sign before it
    return "".join(marked(part) if i % 2 == 0 else part for i, part in enumerate(parts))


def marked(text: str) -> str:
    return re.sub(r"([\\*_\[\]#|])", r"\\\1", html.escape(text, quote=False))


# --- modules ---------------------------------------------------------------------------------------------------------


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """The modules that have a place in the Python reference, each with its file."""
    for room in ROOMS:
        if room != "selfsight":
            yield from room_modules(room, package)


def room_modules(room: str, package: Path) -> Iterator[tuple[str, Path]]:
    """The modules of a room; those of a room within it belong to that one."""
    place = package.joinpath(*room.split("."))
    if not place.is_dir():
        yield f"selfsight.{room}", place.with_suffix(".py").resolve()
        return
    for path in sorted(place.rglob("*.py")):
        inner = path.relative_to(package).with_suffix("").parts
        dotted = ".".join(inner)
        if inner[-1] == "__init__" or any(
            dotted.startswith(f"{other}.") for other in ROOMS if other.startswith(f"{room}.")
        ):
            continue
        if not any(part.startswith("_") for part in inner):
            yield f"selfsight.{dotted}", path.resolve()


def module_page(place: str, package: Path) -> str:
    """A room of the package: its modules, each with what its docstrings say."""
    room = place.rpartition("/")[2].removesuffix(".md")
    title = room if room == "selfsight" else f"selfsight.{room}"
    lines = [f"# {title}", "", f"{ROOMS[room][0].upper()}{ROOMS[room][1:]}.", ""]
    if room == "selfsight":
        import selfsight

        homes = {name: f"selfsight.{module}.{there}" for name, (module, there) in selfsight._HOMES.items()}
        for name, path in homes.items():
            lines += [f"::: {path}", "    options:", f"      heading: selfsight.{name}", f"      toc_label: {name}", ""]
        return "\n".join(lines)
    return "\n".join([*lines, *(f"::: {name}\n" for name, _ in room_modules(room, package))])
