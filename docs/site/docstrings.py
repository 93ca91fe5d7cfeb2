"""Docstrings as the reference reads them: two colons before code are one, arguments that share a line get one each."""

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
    """``a, b: said`` in a list of arguments becomes a line for each, and so does ``b`` in ``a: said. b: said``.

    A citation, which looks alike, stays.
    """

    def apart(found: re.Match[str]) -> str:
        names, said = found.groups()
        return "\n".join(f"    {name}: {said}" for name in names.split(", "))

    def listed(found: re.Match[str]) -> str:
        lines = re.sub(r"(?<=\.)(?: |\n {8})([a-z_]\w*(?:, [a-z_]\w*)*: )", r"\n    \1", found.group())
        return re.sub(r"^ {4}(\w+(?:, \w+)+): (.+(?:\n {8,}.+)*)$", apart, lines, flags=re.M)

    text = re.sub(r"^(?:Args|Attributes):\n(?:(?: {4}.*)?\n?)+", listed, text, flags=re.M)
    return re.sub(r"::$", ":", text, flags=re.M)
