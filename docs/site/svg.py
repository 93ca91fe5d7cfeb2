"""What the pictures of the documentation are drawn with: small SVG files that read on light and on dark ground."""

from __future__ import annotations

from html import escape

#: name: colour on light ground, on dark ground
COLOURS = {
    "ink": ("#1d2733", "#e8ebf0"),
    "soft": ("#5a6878", "#a3afbd"),
    "line": ("#c9d1da", "#3c4653"),
    "plain": ("#f4f6f8", "#1c2129"),
    "net": ("#dfebf9", "#173450"),
    "net-edge": ("#4a7fbd", "#5c9ade"),
    "slow": ("#efe6f6", "#35234a"),
    "slow-edge": ("#8f64b0", "#b58ad6"),
    "loss": ("#fdeed6", "#47310c"),
    "loss-edge": ("#c98a1c", "#e0a53c"),
    "good": ("#2f6fb5", "#6cabee"),
    "bad": ("#c4501b", "#f08a52"),
}
FONT = "Helvetica, Arial, sans-serif"


def document(width: float, height: float, title: str, body: str, size: int = 13) -> str:
    """A whole file; ``title`` is what is read out in place of the picture."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" '
        f'font-family="{FONT}" font-size="{size}" role="img">\n<title>{escape(title)}</title>\n'
        f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>\n{body}\n</svg>\n"
    )


def text(x: float, y: float, words: str, colour: str = "ink", anchor: str = "middle", size: float | None = None) -> str:
    """Lines of text, centred on (x, y) from top to bottom."""
    lines = words.split("\n")
    height = 1.2 * (size or 13)
    attributes = f' font-size="{size:g}"' if size else ""
    return "".join(
        f'<text x="{x:g}" y="{y + (i - (len(lines) - 1) / 2) * height + height * 0.29:.1f}" fill="var(--{colour})" '
        f'text-anchor="{anchor}"{attributes}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
