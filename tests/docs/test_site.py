"""What the documentation site is made of: `make docs` puts it together, and finds links that lead nowhere."""

from __future__ import annotations

import functools
import os
import re
import shlex
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsight.composition.catalogue import GROUPS, JOBS, choices
from selfsight.composition.keys import flat_keys
from selfsight.composition.overrides import checked, compose

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "site"))

import curves  # noqa: E402
import docstrings  # noqa: E402
import drawings  # noqa: E402
import make_site as build  # noqa: E402
import reference  # noqa: E402


@functools.cache
def pages() -> dict[str, str]:
    """Every page of the site with its text, but for the modules', which are made where the site is."""
    places = build.sources()
    written = {place: build.staged(path, places, {}) for path, place in places.items() if path.suffix == ".md"}
    return written | {
        place: text
        for part in ("jobs", "choices", "python")
        for place, text in reference.pages_of(f"reference/{part}/")
    }


def named(nav: object) -> Iterator[str]:
    """The pages in a navigation, however deep."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(inner)


def table_keys(text: str) -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.M))


def test_the_navigation_has_every_page_once() -> None:
    nav = list(named(tomllib.loads(build.settings())["project"]["nav"]))
    assert len(nav) == len(set(nav))
    assert set(nav) == set(pages())


def test_links_and_pictures_of_the_site_are_there() -> None:
    there = {*pages(), *build.sources().values()}
    for place, text in pages().items():
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            if "://" not in link:
                assert os.path.normpath(Path(place).parent / link) in there, f"{place}: {link}"


def test_links_to_source_files_lead_to_their_modules(tmp_path: Path) -> None:
    page, module = tmp_path / "page.md", tmp_path / "swav.py"
    page.write_text("[a](swav.py), [b](other.py), [c](page.md#top), [d](https://example.org)\n\n$$\n\\frac{a}{b}\n$$\n")
    text = build.staged(page, {page: "page.md"}, {module: "selfsight.methods.swav"})
    assert text.startswith("[a][selfsight.methods.swav], b, [c](page.md#top), [d](https://example.org)\n")
    assert "<mfrac>" in text
    assert "$$" not in text


def test_examples_are_marked_as_a_language() -> None:
    """Markdown takes a fence with two words for text."""
    assert "```python run" in (DOCS / "python.md").read_text()
    for place, text in pages().items():
        assert not re.search(r"^```\w+ \w", text, re.M), place


def test_docstrings_are_read_as_markdown() -> None:
    assert docstrings.rewritten("Two of them::\n\n    a(b)\n") == "Two of them:\n\n    a(b)\n"
    arguments = "Args:\n    x, y: ``[N, D]``,\n        both. w: last.\n    z: one.\n"
    apart = "Args:\n    x: ``[N, D]``,\n        both.\n    y: ``[N, D]``,\n        both.\n    w: last.\n    z: one.\n"
    assert docstrings.rewritten(arguments) == apart
    source = "A method.\n\n    Chen, He: Siamese. CVPR 2021. code: there.\n"
    assert docstrings.rewritten(source) == source, "authors are no arguments"


def test_every_formula_is_understood() -> None:
    for place, text in pages().items():
        for formula in re.findall(r"<math.*?</math>", text, re.S):
            assert "\\" not in formula, f"{place}: {formula}"


def test_what_stands_in_code_is_shown_as_it_is() -> None:
    """Neither a sign before a sign, nor a formula that nothing sets."""
    for place, text in pages().items():
        running = re.sub(r"^```.*?^```$|^ {4}[^\n]*$", "", text, flags=re.M | re.S)
        for code in re.findall(r"``.+?``|`[^`\n]+`", running):
            assert not re.search(r"\\[_*|]", code), f"{place}: {code}"
        assert not re.search(r"\$[^$\n]*\\\w+[^$\n]*\$", running), place
    assert reference.escaped(":class:`~a.b.Part` of ``a_b`` in a_b | c") == r"`Part` of ``a_b`` in a\_b \| c"
    assert reference.literal(["", 1]) == "['', 1]"


def test_commands_in_a_comment_are_code() -> None:
    told = reference.prose("selfsight knn: how near.\nselfsight knn run=last\nMore.")
    assert told == "selfsight knn: how near.\n\n    selfsight knn run=last\n\nMore."


def test_what_is_wrong_ends_the_build(tmp_path: Path) -> None:
    assert build.complaints("Build started\nNo issues found\nBuild finished in 9.5s") == []
    assert build.complaints("Build started\n\x1b[33mWarning:\x1b[0m page does not exist")
    assert build.complaints("griffe: losses/swav.py:3: No type or annotation")
    (tmp_path / "a.html").write_text('<a href="https://example.org">out</a> <img src="b.svg">')
    assert list(build.strangers(tmp_path)) == []
    (tmp_path / "a.html").write_text('<script src="https://example.org/x.js"></script>')
    assert len(list(build.strangers(tmp_path))) == 1


def test_a_port_in_use_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "stage", lambda: pytest.fail("nothing is built before that"))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["make_site.py", "--serve", "--port", str(port)])
        assert build.main() == 1
    told = capsys.readouterr().err
    assert told == f"port {port} is in use: end what listens there, or take --port {port + 1}\n"


@pytest.mark.parametrize("job", JOBS)
def test_the_reference_has_every_key_of_a_job(job: str) -> None:
    words = ["evaluator=knn"] if job == "evaluate" else []
    cfg = compose(job, words)
    leaves = {key for key in flat_keys(cfg) if not any(other.startswith(f"{key}.") for other in flat_keys(cfg))}
    missing = {key for key in leaves if key.partition(".")[0] not in ("job", "choices")} - table_keys(
        pages()[f"reference/jobs/{job}.md"]
    )
    assert not missing


@pytest.mark.parametrize("group", [group for group in GROUPS if choices(group)])
def test_the_reference_has_every_choice(group: str) -> None:
    assert re.findall(r"^## (\S+)$", pages()[f"reference/choices/{group}.md"], re.M) == choices(group)


@pytest.mark.parametrize("method", ["swav", "fixmatch", "mae"])
def test_the_reference_has_every_key_of_a_choice(method: str) -> None:
    section = pages()["reference/choices/method.md"].partition(f"## {method}\n")[2].partition("\n## ")[0]
    keys = set(flat_keys(compose("pretrain", [f"method={method}", "presets=null"]).method))
    assert {f"method.{key}" for key in keys} <= table_keys(section)


def test_a_key_is_told_with_its_default_and_meaning() -> None:
    text = pages()["reference/jobs/pretrain.md"]
    assert re.search(r"^\| `batch_size` \| `256` \| global: over all devices \|$", text, re.M)
    assert re.search(r"^\| `trainer.devices` \| `auto` \| how many, or which GPUs; .* \|$", text, re.M)  # a docstring's
    assert "name of the run folder; null: &lt;method&gt;" in text  # no tag


def test_every_method_has_its_drawing() -> None:
    """As the script draws it."""
    for page in (DOCS / "methods").glob("*.md"):
        if page.stem != "steps":
            assert f"](../images/drawings/{page.stem}.svg)" in page.read_text(), page.name
    for name, drawing in drawings.DRAWINGS.items():
        assert (drawings.FOLDER / f"{name}.svg").read_text() == drawing.draw(), f"{name}: python docs/site/drawings.py"


def test_every_curve_is_of_a_run_that_composes() -> None:
    text = (DOCS / "curves.md").read_text()
    for words in curves.TRAININGS.values():
        checked("pretrain", [*shlex.split(words), *curves.QUIET])
        assert f"selfsight pretrain {words}" in text
    for picture, (runs, columns) in curves.PICTURES.items():
        assert set(runs) <= set(curves.TRAININGS)
        for key in columns:
            assert f"](images/curves/{picture}-{key}.svg)" in text
