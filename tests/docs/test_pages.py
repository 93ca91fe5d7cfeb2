"""What the pages say of the source is so: links, paths, floors, old names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..structure.test_layout import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_found() -> None:
    """From the index, or from a page that it leads to."""
    index = ROOT / "docs" / "index.md"
    seen: set[Path] = set()
    waiting = [index]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert {path.resolve() for path in (ROOT / "docs").rglob("*.md")} <= seen | {index}


def test_the_floors_are_those_that_are_checked() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    told = {
        room: int(floor)
        for floor, rooms in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.M)
        for room in re.findall(r"`(\w+)`", rooms)
        if "/" not in rooms
    }
    assert told == FLOORS


def test_paths_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    spine = re.findall(r"^\| \d+ \| `([\w/.]+)`", text, re.M)
    assert len([path for path in spine if path.endswith(".py")]) == 11
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert any((top / path).is_file() for top in (ROOT, ROOT / "ssl" / "selfsight")), path


def test_what_was_renamed_resolves() -> None:
    """The table of the changelog, name by name."""
    from hydra.utils import get_object

    text = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `(selfsight\.[\w.]+?)\.?(?:\{([\w,]+)\})?` \| `(selfsight[\w.]+)", text, re.M)
    assert len(rows) >= 7
    for old, several, new in rows:
        for name in several.split(",") if several else [""]:
            module = get_object(f"{old}.{name}".rstrip("."))
            assert module.__name__.startswith(new.rstrip(".…"))


def test_the_version_is_one() -> None:
    import tomllib

    import yaml

    import selfsight

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released is not None
    assert selfsight.__version__ == project["version"] == cited["version"] == released[1]
