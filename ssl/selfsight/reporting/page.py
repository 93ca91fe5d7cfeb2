"""What the HTML pages of all jobs share: how they look, and figures and tables in them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea; --accent: #2f5fd0; --wrong: #d5321d; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 28px 20px 80px; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 27px; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 46px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 24px 0 4px; }
p { margin: 6px 0; } .soft { color: var(--soft); } a { color: var(--accent); }
nav { margin: 10px 0 0; display: flex; gap: 4px 18px; flex-wrap: wrap; }
table { border-collapse: collapse; margin: 10px 0; } .wide { overflow-x: auto; }
th, td { padding: 7px 14px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tr.best td { font-weight: 650; }
pre { background: #f5f7fa; padding: 12px; border-radius: 6px; font-size: 13px; line-height: 1.45;
      white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 8px 18px; }
.grid > div { min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); gap: 4px 24px; }
.row { display: flex; gap: 4px; align-items: flex-start; margin: 4px 0; flex-wrap: wrap; }
figure { margin: 0; width: 56px; text-align: center; }
figure img { width: 56px; height: 56px; object-fit: contain; image-rendering: pixelated; display: block;
             border: 3px solid transparent; border-radius: 5px; background: #f1f3f6; }
figcaption { font-size: 11px; line-height: 1.25; color: var(--soft); overflow: hidden; overflow-wrap: anywhere;
             display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
figure.query { margin-right: 12px; } figure.query img { border-color: var(--accent); }
figure.large, figure.large img { width: 150px; height: auto; }
figure.wrong img { border-color: var(--wrong); } figure.wrong figcaption { color: var(--wrong); }
.views { align-items: center; } figure:has(img.source) { width: 150px; margin-right: 10px; }
img.source { width: 150px !important; height: 150px !important; border-width: 0 !important; }
.views figure:not(:has(img.source)) { width: 76px; } .views img:not(.source) { width: 76px; height: 76px; }
#card { position: fixed; z-index: 9; pointer-events: none; background: #fff; border: 1px solid var(--line);
        border-radius: 8px; padding: 8px; box-shadow: 0 4px 18px rgb(0 0 0 / 16%); max-width: 190px; }
#card-picture { width: 96px; height: 96px; margin: 0 auto 4px; image-rendering: pixelated; }
#card-text { font-size: 12px; line-height: 1.35; white-space: pre-line; overflow-wrap: anywhere; }
[hidden] { display: none !important; }
@media (max-width: 760px) { th, td { padding: 7px 6px; font-size: 14px; } }
"""

PALETTE = ("#2f5fd0", "#d3722e", "#2e9a6b", "#8a4fc7", "#c2405f")
DASHES = ("solid", "dot", "dash", "dashdot")


def stroke(i: int) -> dict[str, str]:
    """What tells line ``i`` from the others of a figure: a colour, and where these are used up, dashes."""
    return {"color": PALETTE[i % len(PALETTE)], "dash": DASHES[i // len(PALETTE) % len(DASHES)]}


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page that needs nothing from a network, the plotting library in it."""
    from plotly.offline import get_plotlyjs

    made = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>"
    )
    return made.encode(errors="replace").decode()  # names of files may hold bytes that are no text


def figure_html(
    figure: go.Figure, height: int = 300, name: str | None = None, config: Mapping[str, object] | None = None
) -> str:
    """A plotly figure as a part of a `page`, in its colours.

    Args:
        height: in pixels. name: id of the element, of a figure without axes. config: plotly's, in addition.
    """
    top = 60 if figure.layout.updatemenus else 40
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 15, "t": top, "b": 10} if name else {"l": 50, "r": 15, "t": top, "b": 40},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        colorway=PALETTE,
    )
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True, **(config or {})},
    )
    return text


def html_table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading, left out where it is empty, and a table of plain text below it."""
    head = "".join(f"<th>{html.escape(t)}</th>" for t in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f"{heading}<div class='wide'><table><tr>{head}</tr>{body}</table></div>"
