"""Docstrings as the reference reads them: two colons before code are one, arguments that share a line have one each."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """``a, b: said`` in a list of arguments becomes a line for each."""

    def apart(found: re.Match[str]) -> str:
        names, said = found.groups()
        return "\n".join(f"    {name}: {said}" for name in names.split(", "))

    text = re.sub(r"^ {4}(\w+(?:, \w+)+): (.+(?:\n {8,}.+)*)$", apart, text, flags=re.M)
    return re.sub(r"::$", ":", text, flags=re.M)
