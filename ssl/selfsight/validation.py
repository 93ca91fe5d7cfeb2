"""What a user's values have to be: said in words, asked as a question, and one sentence that refuses the others."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from selfsight.errors import USAGE, UserError, nearest

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """What a value has to be; ``a | b`` is either.

    Attributes:
        said: in words. fits: as a question. words: what it may be, where that is a choice.
        empty: whether a list of such may hold nothing.
    """

    said: str
    fits: Callable[[Any], bool]
    words: tuple[str, ...] = ()
    empty: bool = False

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.said} or {other.said}", lambda v: self.fits(v) or other.fits(v), self.words + other.words)


def expect(key: str, value: Any, kind: Kind) -> Any:
    """``value``, which is of this kind; a number of numpy as Python's.

    Raises:
        UserError: it is not; names key, value, and what was expected.
    """
    if kind.fits(value):
        return _plain(value)
    several = value if is_list(value) else [value]
    wrong = [v for v in several if isinstance(v, str) and v not in kind.words]
    hint = nearest(wrong[0], kind.words) if wrong else ""
    raise UserError(f"{key} is {shown(value)}; {kind.said} was expected.{hint}", status=USAGE)


def takes(**kinds: Kind) -> Callable[[Made], Made]:
    """A class or function that refuses arguments which are not of the kind of their name.

    What else an argument may be is read from its annotation. Where that names a sequence, a single value becomes a list
    of one; where it names None, None passes.

    Raises:
        UserError: when it is called; see `expect`.
    """

    def decorate(made: Made) -> Made:
        function: Callable[..., Any] = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
        signature, hints = inspect.signature(function), get_type_hints(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            for name in [name for name in given.arguments if name in kinds]:
                value, kind, parts = given.arguments[name], kinds[name], (hints[name], *get_args(hints[name]))
                many = any(get_origin(part) in (Sequence, list, tuple) for part in parts)
                kind = each(kind) if many and is_list(value) else kind
                value = expect(f"{name} of {made.__name__}", value, NULL | kind if type(None) in parts else kind)
                if many and value is not None:
                    value = list(map(_plain, value)) if is_list(value) else [value]
                given.arguments[name] = value
            return function(*given.args, **given.kwargs)

        if not isinstance(made, type):
            return checked  # type: ignore[return-value]
        made.__init__ = checked  # type: ignore[misc]
        return made

    return decorate


# --- kinds -----------------------------------------------------------------------------------------------------------


def whole(low: int, high: int | None = None, *, empty: bool = False) -> Kind:
    """Whole numbers from ``low`` to ``high``."""
    said = f"a whole number {f'of at least {low}' if high is None else f'from {low} to {high}'}"
    return Kind(said, lambda v: _is(v, Integral) and low <= v and (high is None or v <= high), empty=empty)


def number(said: str, inside: Callable[[Any], bool]) -> Kind:
    """Finite numbers in a range."""
    return Kind(said, lambda v: _is(v, Real) and abs(v) < math.inf and inside(v))


def above(bound: float) -> Kind:
    """Finite numbers above ``bound``, which itself is none of them."""
    return number(f"a number above {bound:g}", lambda v: v > bound)


def at_least(low: float) -> Kind:
    """Finite numbers from ``low`` on."""
    return number(f"a number of at least {low:g}", lambda v: v >= low)


def one_of(*choices: Any) -> Kind:
    """One of some words, numbers, true, false and null; a number may come as text and the other way round."""

    def asked(value: Any) -> tuple[bool, str]:
        return value is None or isinstance(value, bool), str(value)

    known = set(map(asked, choices))
    words = tuple(choice if isinstance(choice, str) else shown(choice) for choice in choices)
    said = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    return Kind(said, lambda v: asked(v) in known, words)


def each(kind: Kind) -> Kind:
    """Lists of what is of one kind."""

    def fits(value: Any) -> bool:
        return is_list(value) and (len(value) > 0 or kind.empty) and all(map(kind.fits, value))

    return Kind(f"a list in which each is {kind.said}", fits, kind.words)


def is_list(value: Any) -> bool:
    """Of YAML or Python; text is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def shown(value: Any) -> str:
    """A value as it stands in YAML."""
    if is_list(value):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"'{value}'" if isinstance(value, (str, Path)) else str(value)


def _is(value: Any, number: type) -> bool:
    return isinstance(value, number) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    # torch and JSON do not take every number of numpy
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


NULL, AUTO = one_of(None), one_of("auto")
SWITCH, AUTO_SWITCH = one_of(True, False), one_of(True, False, "auto")
SHARE = number("a share from 0 to 1", lambda v: 0 <= v <= 1)


# --- fields ----------------------------------------------------------------------------------------------------------


def check_fields(options: Any, place: str = "") -> None:
    """Check the fields of a dataclass whose annotation names a kind: ``Annotated[int, whole(1)]``.

    Args:
        place: what stands before a field's name in the sentence that refuses it, such as ``trainer.``.

    Raises:
        UserError: see `expect`.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        for kind in getattr(hint, "__metadata__", ()):
            expect(f"{place}{name}", getattr(options, name), kind)
