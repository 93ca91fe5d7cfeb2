"""Every command on the pages is one that composes; none of them is run here. test_sequences.py types most of them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsight.cli import split_flags
from selfsight.composition.catalogue import POSITIONAL, choices, job_groups
from selfsight.composition.overrides import checked, load

from . import test_sequences

DOCS = Path(__file__).parents[2] / "docs"
#: those of extending.md take a package, with which tests/plugin runs them
PAGES = [
    DOCS.parent / "README.md",
    DOCS.parent / "CONTRIBUTING.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.name != "extending.md"),
]
TYPED = [DOCS.parent / page for page in test_sequences.PAGES]
#: a line of its own, or a phrase of a sentence or a table; a line may go on after a backslash
COMMAND = re.compile(r"^    (selfsight (?:\\\n|.)*)$|`(selfsight \w[^`]*=[^`…]*)`", re.M)


def commands(page: Path) -> Iterator[str]:
    """Those of a page, each once; of a page that is typed from top to bottom those within sentences."""
    found = [hit.groups() for hit in COMMAND.finditer(page.read_text())]
    said = [phrase if page in TYPED else line or phrase for line, phrase in found]
    yield from dict.fromkeys(command.replace("\\\n", " ") for command in said if command)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_compose(page: Path) -> None:
    for command in commands(page):
        flags, (job, *words) = split_flags(shlex.split(command, comments=True)[1:] or ["pretrain"])
        words = [word for word in words if job not in POSITIONAL or "=" in word]  # folders stand by themselves
        if not any("_target_=my" in word for word in words):  # a module that the reader has
            composes(job, *words, sweep="multirun" in flags.switches)


@functools.cache
def composes(job: str, *words: str, sweep: bool) -> None:
    """A wrong word, or one that does not go with the others, is a UserError that names it."""
    overrides = checked(job, words, sweep=sweep)
    if not sweep and all(word.partition("=")[0] in job_groups(job) for word in words):
        load(job, overrides)  # values are composed to be checked


def test_commands_are_found() -> None:
    assert "selfsight pretrain recipe=digits/dino" in commands(DOCS / "choosing.md")  # in a table
    found = [shlex.split(command, comments=True) for command in commands(DOCS / "methods" / "dino.md")]
    assert ["selfsight", "pretrain", "recipe=digits/dino"] in found  # before a comment
    assert "schedule.teacher_momentum.start=0.9995" in found[1]  # on a second line


def test_every_method_can_be_chosen() -> None:
    """The table has a row for each, which leads to its page and has a command for it."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(methods/\w+\.md\).*`selfsight pretrain ([^ `]+)", (DOCS / "choosing.md").read_text(), re.M
    )
    assert sorted(method for method, _ in rows) == choices("method")
    for method, word in rows:
        assert word in (f"recipe=digits/{method}", f"method={method}")
