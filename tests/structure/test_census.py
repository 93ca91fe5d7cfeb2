"""The figures that keep the house one that can be walked."""

from __future__ import annotations

import pytest

from . import census


def test_no_files_import_one_another_in_a_ring() -> None:
    assert census.circles() == []


def test_names_in_strings_become_objects_at_the_doors_alone() -> None:
    assert census.string_imports() == []


def test_what_goes_from_hand_to_hand_above_the_datamodules_has_a_type() -> None:
    loose = census.untyped()
    assert sum(loose.values()) < 40, loose


@pytest.mark.slow
def test_the_configuration_of_pretrain_dies_at_one_door() -> None:
    taken = census.handed_on(("debug=smoke", "report=false"))
    assert 0 < len(taken) < 30, taken
    assert len({place.partition(":")[0] for place in taken}) <= 12, taken


def test_a_ring_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "imports", lambda: {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert census.circles() == [["a", "b", "c"]]
