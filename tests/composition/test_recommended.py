"""Every word that a sentence of the program recommends is one that can be typed: its key, or its group, exists."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from selfsight import cli
from selfsight.composition import catalogue
from selfsight.composition.keys import OPEN, arguments_of, flat_keys, node_at

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "ssl").rglob("*.py")), *sorted((ROOT / "datamodules").rglob("*.py")),
           *sorted((ROOT / "evaluation").rglob("*.py"))]  # fmt: skip
#: ``key=value`` in a sentence; no part of a path, an equation or another program's command
WORD = re.compile(r"(?<![\w./'\"{}\[(=:-])([~+]{0,2}[a-z][a-z_]*(?:\.[a-z_]+)*)=(?![= ])")
#: arguments of Python, of a shell and of layers as they show themselves, which no command takes
NOT_OURS = {"num_classes", "padding", "bias", "pretrained", "eps", "momentum", "sync", "install", "key"}


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of more than a word that are no documentation, with their lines."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation | parts:
            text = node.value
        if " " in text.strip() and "<" not in text:  # HTML has attributes
            yield node.lineno, text


def recommended() -> list[tuple[str, str]]:
    """Every word that is recommended, and where."""
    found = {}
    for path in SOURCES:
        for line, text in sentences(path):
            for word in WORD.findall(text):
                found.setdefault(word.lstrip("~+"), f"{path.relative_to(ROOT)}:{line}")
    return [(word, place) for word, place in sorted(found.items()) if word not in NOT_OURS]


@cache
def typed() -> frozenset[str]:
    """Keys and groups of every job and every choice, with the arguments of what they make."""
    known = {group for job in cli.JOBS for group in catalogue.job_groups(job)}
    for path in sorted(cli.conf_dir().rglob("*.yaml")):
        content = OmegaConf.load(path)
        assert isinstance(content, DictConfig)
        whole = path.parent == cli.conf_dir() or "# @package _global_" in path.read_text()
        cfg = content if whole else OmegaConf.create({path.parent.name: content})
        keys = [*flat_keys(cfg)]
        known |= {*keys}
        for part in keys:
            with contextlib.suppress(InterpolationKeyError):  # a file by itself does not have all that it refers to
                known |= {f"{part}.{name}" for name in arguments_of(node_at(cfg, part), part)}
    return frozenset(known)


def exists(word: str) -> bool:
    parent, _, leaf = word.rpartition(".")
    return word in typed() or parent in OPEN or (leaf == "_target_" and parent in typed())


@pytest.mark.parametrize(("word", "place"), recommended())
def test_a_recommended_word_can_be_typed(word: str, place: str) -> None:
    assert exists(word), f"{place} recommends '{word}=', which no job, group or choice has"


def test_words_are_found() -> None:
    words = {word for word, _ in recommended()}
    assert {"batch_size", "dataset.root", "resume", "trainer.precision", "labels.per_class"} <= words
    assert not exists("trainer.max_epoch")
