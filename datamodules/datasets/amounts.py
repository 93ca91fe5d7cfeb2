"""How many labels are kept: the words for it, checked where no images are there yet. Imports nothing large."""

from __future__ import annotations

from collections.abc import Mapping

from selfsight.errors import UserError

#: keys of `labels` that say how many, or name a file that says which
AMOUNTS, FILES = ("per_class", "total", "fraction"), ("list", "split")


def is_said(labels: Mapping[str, object]) -> bool:
    """Whether something says how many labels are kept, or which."""
    return labels.get("rule") == "all" or any(labels.get(key) is not None for key in (*AMOUNTS, *FILES))


def refuse_other_than_one(labels: Mapping[str, object]) -> None:
    """
    Raises:
        UserError: nothing says how many labels are kept, or more than one key does.
    """
    given = [key for key in (*AMOUNTS, *FILES) if labels.get(key) is not None]
    if len(given) > 1 and given[-1] in FILES:
        raise UserError(f"labels.{given[-1]} already says which images keep labels; leave out labels.{given[0]}.")
    if labels.get("rule") in ("all", "list") or len(given) == 1:
        return
    set_here = f"{len(given)} of the first three are set" if given else "none of them is set"
    raise UserError(
        "give one of labels.per_class, labels.total and labels.fraction, or labels.list=FILE, or labels.rule=all: "
        f"{set_here}; for four labels of each class, labels.per_class=4."
    )
