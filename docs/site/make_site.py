"""The documentation site: the pages of `docs` and of the repository's root, what is generated beside them, Zensical.

    python docs/site/make_site.py [--serve [--port 8000]]

Pages stay Markdown that can be read as it is, in an editor or on a code host. For the site they are copied into
`build/docs` with few changes: formulas become MathML, examples lose their mark, links to source files lead to modules
in the Python reference, and links to what the site does not hold lose their target. The site lands in `build/docs/site`
and needs no network, neither to be made nor to be read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import reference

ROOT = Path(__file__).parents[2]
DOCS, HERE = ROOT / "docs", ROOT / "docs" / "site"
STAGE = ROOT / "build" / "docs"
SITE = STAGE / "site"
#: pages of the root, and what they are called on the site
ROOT_PAGES = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
ZENSICAL = (sys.executable, "-m", "zensical")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w+) run$", re.M)  # an example that a test runs
FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.M | re.S)
#: line in zensical.toml that the pages of a folder take the place of
GENERATED = re.compile(r'^( *)"(reference/\w+/)\*",$', re.M)


def sources() -> dict[Path, str]:
    """Every file that the site copies: where it lies, and its path on the site."""
    pages = {path: path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md")) if HERE not in path.parents}
    pictures = [*(DOCS / "images").rglob("*.svg"), *(DOCS / "images").rglob("*.png")]
    return (
        {ROOT / name: place for name, place in ROOT_PAGES.items()}
        | pages
        | {path: path.relative_to(DOCS).as_posix() for path in sorted(pictures)}
    )


def staged(path: Path, places: dict[Path, str], modules: dict[Path, str]) -> str:
    """The text of a page as the site has it."""
    from latex2mathml.converter import convert

    here = Path(places[path]).parent

    def led(found: re.Match[str]) -> str:
        sign, text, link = found.groups()
        file, hash_sign, anchor = link.partition("#")
        if not file or "://" in file:
            return found.group()
        target = (path.parent / file).resolve()
        if target in modules:
            return f"[{text}][{modules[target]}]"
        if target not in places:
            return text
        return f"{sign}[{text}]({Path(os.path.relpath(places[target], here)).as_posix()}{hash_sign}{anchor})"

    def formula(found: re.Match[str]) -> str:
        return f'<div class="formula">{convert(" ".join(found[1].split()), display="block")}</div>'

    return FENCE.sub(r"```\1", FORMULA.sub(formula, LINK.sub(led, path.read_text(encoding="utf-8"))))


def stage() -> None:
    """Lay out everything that Zensical reads."""
    shutil.rmtree(STAGE, ignore_errors=True)
    package = STAGE / "package" / "selfsight"  # its parts lie in four folders; the reference is made from one
    package.mkdir(parents=True)
    for part in [
        *(ROOT / "ssl" / "selfsight").iterdir(),
        *(ROOT / name for name in ("datamodules", "evaluation", "conf")),
    ]:
        (package / part.name).symlink_to(part)
    places, pages = sources(), STAGE / "pages"
    modules = {path: name for name, path in reference.modules(package)}
    for path, place in places.items():
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            (pages / place).write_text(staged(path, places, modules), encoding="utf-8")
        else:
            shutil.copy(path, pages / place)
    for place, text in reference.pages(package):
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        (pages / place).write_text(text, encoding="utf-8")
    shutil.copytree(HERE / "assets", pages / "assets", dirs_exist_ok=True)
    shutil.copy(HERE / "docstrings.py", STAGE)
    (STAGE / "zensical.toml").write_text(settings(), encoding="utf-8")


def settings() -> str:
    """Zensical's settings, with the generated pages in the navigation, in the order in which they are made."""

    def entries(found: re.Match[str]) -> str:
        indent, folder = found.groups()
        places = [place for place, _ in reference.pages_of(folder)]
        return "\n".join(
            f'{indent}{{ "{place.removeprefix(folder).removesuffix(".md")}" = "{place}" }},' for place in places
        )

    return GENERATED.sub(entries, (HERE / "zensical.toml").read_text(encoding="utf-8"))


def complaints(output: str) -> list[str]:
    """What Zensical, mkdocstrings or griffe warned of."""
    return [line for line in output.splitlines() if re.search(r"warning|error|griffe:", line, re.I)]


def strangers(site: Path) -> Iterator[str]:
    """Files of other hosts that a page would load."""
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            if re.search(r'(?:src|href)="https?://', tag) and 'rel="canonical"' not in tag:
                yield f"{page.relative_to(site)}: {tag}"


def free(port: int) -> bool:
    """Whether nobody listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def serve(port: int) -> int:
    """Serve the site until Ctrl-C; pages that are changed meanwhile are laid out again, and the browser shows them."""
    places, modules = sources(), {path: name for name, path in reference.modules(STAGE / "package" / "selfsight")}
    seen = {path: path.stat().st_mtime for path in places}
    server = subprocess.Popen([*ZENSICAL, "serve", "--dev-addr", f"localhost:{port}"], cwd=STAGE)
    try:
        while server.poll() is None:
            time.sleep(1)
            for path in places:
                if path.suffix == ".md" and path.is_file() and (changed := path.stat().st_mtime) != seen[path]:
                    seen[path] = changed
                    (STAGE / "pages" / places[path]).write_text(staged(path, places, modules), encoding="utf-8")
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return 0
    return server.returncode


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--serve", action="store_true", help="serve the site at http://localhost:PORT until Ctrl-C")
    words.add_argument("--port", type=int, default=8000, help="where it is served; 8000")
    given = words.parse_args()
    if given.serve and not free(given.port):
        print(f"port {given.port} is in use: end what listens there, or take --port {given.port + 1}", file=sys.stderr)
        return 1
    stage()
    if given.serve:
        return serve(given.port)
    done = subprocess.run([*ZENSICAL, "build", "--strict", "--clean"], cwd=STAGE, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode or complaints(output):
        print(output, file=sys.stderr)
        print("the site was not built: see above", file=sys.stderr)
        return 1
    if loaded := list(strangers(SITE)):
        print("pages load what lies elsewhere:", *loaded, sep="\n  ", file=sys.stderr)
        return 1
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages: {SITE.relative_to(ROOT)}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
