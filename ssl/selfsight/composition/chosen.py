"""The words that choose by a group: ``method=swav``, a sweep of them, a pattern, a network of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfsight.composition.catalogue import SEVERAL, choices, content, file, job_groups, recipe_job
from selfsight.composition.keys import Override
from selfsight.errors import USAGE, UserError, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override as Parsed


def group_choice(group: str, word: str, parsed: Parsed, job: str = "pretrain") -> list[str]:
    """The words that choose what ``group=…`` names.

    Raises:
        UserError: there is no such choice, it is made for another job, or one is needed and null was given.
    """
    known = choices(group, job)
    override = Override(word, parsed)
    if parsed.is_delete() or override.bare in (f"{group}=null", f"{group}=[]"):
        return left_out(job, group)
    names = chosen_names(group, override, known)
    unknown = [name for name in names if name not in known and name != "null"]
    if unknown and group == "backbone":
        return timm_choice(names, unknown, known)
    if unknown and group == "recipe" and unknown[0] in choices(group):
        raise UserError(f"recipe={unknown[0]} is one for `selfsight {recipe_job(unknown[0])}`.", status=USAGE)
    if unknown:
        raise UserError(
            f"there is no {group} '{unknown[0]}'{' for ' + job if unknown[0] in choices(group) else ''}; "
            f"choose from {', '.join(known)}.{nearest(unknown[0], known)}",
            status=USAGE,
        )
    for name in names:
        if name != "null":
            content(file(group, name))  # which refuses what is no configuration
    return [f"{group}={','.join(names)}" if parsed.is_sweep_override() else override.bare]


def chosen_names(group: str, override: Override, known: Sequence[str]) -> list[str]:
    """The choices that a word names, those of a sweep and of a pattern included.

    Raises:
        UserError: several at once where one is expected, or a pattern that fits none.
    """
    parsed = override.parsed
    if override.is_pattern:
        found = [str(name) for name in override.value.filter(list(known))]
        if not found:
            raise UserError(f"'{override.text}' fits none of {', '.join(known)}.", status=USAGE)
        return found
    if parsed.is_interval_sweep():
        raise UserError(
            f"'{override.text}' gives numbers; the choices of {group} are {', '.join(known)}.", status=USAGE
        )
    if isinstance(override.value, list) and group not in SEVERAL:
        raise UserError(f"'{override.text}' makes several choices of {group} at once; one was expected.", status=USAGE)
    return [str(v) for v in parsed.sweep_string_iterator()] if parsed.is_sweep_override() else override.names


def left_out(job: str, group: str) -> list[str]:
    """The words that leave a group without a choice, if the job can do without."""
    if group in ("logger", "presets"):
        return [f"~{group}"]
    if job_groups(job)[group] is None:
        return []
    raise UserError(
        f"`selfsight {job}` cannot do without a choice of {group}; choose from {', '.join(choices(group, job))}.",
        status=USAGE,
    )


def timm_choice(names: Sequence[str], unknown: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words for a backbone that is no choice of ours."""
    from selfsight.backbones.registry import is_known

    if all(is_known(name) for name in unknown):
        if len(names) > 1:
            raise UserError(
                f"backbone={unknown[0]} is a timm name and cannot be swept beside others; "
                f"use backbone=timm backbone.name={','.join(names)}.",
                status=USAGE,
            )
        return ["backbone=timm", f"backbone.name={unknown[0]}"]
    import timm

    raise UserError(
        f"there is no backbone '{unknown[0]}', neither here nor in timm."
        f"{nearest(unknown[0], [*known, *timm.list_models()])}",
        status=USAGE,
    )
