"""What a user has set is given back, or refused in one sentence with what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from selfsight.errors import USAGE, UserError
from selfsight.validation import AUTO, NULL, SHARE, SWITCH, Kind, above, at_least, each, expect, one_of, takes, whole

COLOURS = one_of("red", "green", "blue")
PRECISION = one_of("auto", "bf16", "16")


@takes(several=whole(1), few=whole(1, empty=True), one=above(0))
def taking(several: Sequence[int] | None, few: list[int], one: float = 1.0, rest: Any = None) -> Any:
    return several, few, one, rest


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, whole(1)),
        (6, whole(0, 6)),
        (10**400, whole(0)),
        ("auto", AUTO | whole(0)),
        (None, NULL | whole(1)),
        (0, at_least(0)),
        (1e-9, above(0)),
        (0, SHARE),
        (Fraction(1, 3), SHARE),
        (False, SWITCH),
        (16, PRECISION),
        ("16", PRECISION),
        ([1, 2], each(whole(1))),
        (OmegaConf.create([1, 2]), each(whole(1))),
        ([], each(whole(1, empty=True))),
    ],
)
def test_what_fits_is_given_back(value: Any, kind: Kind) -> None:
    assert expect("n", value, kind) is value


def test_numbers_of_numpy_become_pythons() -> None:
    assert type(expect("n", np.int64(3), whole(1))) is int
    assert type(expect("n", np.float32(0.5), SHARE)) is float
    several, few, *_ = taking([np.int64(3)], np.int64(4))  # type: ignore[arg-type]
    assert (type(several[0]), type(few[0])) == (int, int)


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (2.5, whole(1), "2.5; a whole number of at least 1 was expected."),
        (1.0, whole(1), "1.0; a whole number of at least 1 was expected."),
        (True, whole(1), "true; a whole number of at least 1 was expected."),
        (None, whole(1), "null; a whole number of at least 1 was expected."),
        (7, whole(0, 6), "7; a whole number from 0 to 6 was expected."),
        ("all", AUTO | whole(0), "'all'; auto or a whole number of at least 0 was expected."),
        ("null", NULL | whole(0), "'null'; null or a whole number of at least 0 was expected."),
        (0, above(0), "0; a number above 0 was expected."),
        (-0.1, at_least(0), "-0.1; a number of at least 0 was expected."),
        (float("inf"), at_least(0), "inf; a number of at least 0 was expected."),
        (float("nan"), SHARE, "nan; a share from 0 to 1 was expected."),
        (True, SHARE, "true; a share from 0 to 1 was expected."),
        ("0.5", SHARE, "'0.5'; a share from 0 to 1 was expected."),
        ("true", SWITCH, "'true'; true or false was expected."),
        (1, SWITCH, "1; true or false was expected."),
        (Path("a"), COLOURS, "'a'; red, green or blue was expected."),
        (["red"], COLOURS, "['red']; red, green or blue was expected."),
        ("bleu", COLOURS, "'bleu'; red, green or blue was expected. Did you mean 'blue'?"),
        ("aut", AUTO | whole(0), "'aut'; auto or a whole number of at least 0 was expected. Did you mean 'auto'?"),
        ([], each(whole(1)), "[]; a list in which each is a whole number of at least 1 was expected."),
        ((1, None), each(whole(1)), "[1, null]; a list in which each is a whole number of at least 1 was expected."),
        ("12", each(whole(1)), "'12'; a list in which each is a whole number of at least 1 was expected."),
        (
            ["red", "gren"],
            each(COLOURS),
            "['red', 'gren']; a list in which each is red, green or blue was expected. Did you mean 'green'?",
        ),
    ],
)
def test_what_does_not_is_one_sentence(value: Any, kind: Kind, told: str) -> None:
    with pytest.raises(UserError) as said:
        expect("n", value, kind)
    assert str(said.value) == f"n is {told}"
    assert said.value.status == USAGE


def test_annotations_say_what_else_an_argument_may_be() -> None:
    assert taking(2, few=()) == ([2], [], 1.0, None)  # type: ignore[arg-type]
    assert taking(None, range(1, 3), rest=-1) == (None, [1, 2], 1.0, -1)  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [{"several": []}, {"few": None}, {"few": [[]]}, {"one": None}, {"one": [1]}]
    for given in wrong:
        (name,) = given
        with pytest.raises(UserError, match=f"^{name} of taking is .* was expected"):
            taking(**{"several": 1, "few": 1, **given})
