"""The table of a run: raw pixels, the untrained and the pretrained network under the same protocols."""

from __future__ import annotations

import html
from collections.abc import Mapping

from selfsight.engine import measure
from selfsight.engine.measure import ROWS
from selfsight.evaluation.base import Figures


def table(summary: Mapping[str, Figures]) -> str:
    """Accuracy of pixels, untrained and pretrained network, with the protocol of each number below it."""
    rows = {key: label for key, label in ROWS.items() if key in summary}
    if not rows:
        return ""
    columns = measure.singles(summary[row] for row in rows)
    shots = sorted({k for row in rows for k in summary[row].get("few_shot", {})}, key=int)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    head += "".join(f"<th>{k} label{'s' * (k != '1')} a class</th>" for k in shots)
    body = ""
    for row, label in rows.items():
        values = summary[row]
        cells = "".join(
            f"<td>{measure.figure(key, values[key])}</td>" if key in values else "<td></td>" for key in columns
        )
        for k in shots:
            shot = values.get("few_shot", {}).get(k)
            cells += f"<td>{100 * shot['mean']:.1f} ± {100 * shot['std']:.1f} %</td>" if shot else "<td></td>"
        body += f"<tr{' class=best' if row == 'pretrained' else ''}><td>{label}</td>{cells}</tr>"
    notes = "".join(
        f"<p class='soft'>{html.escape(n)}: {html.escape(p)}</p>" for n, p in summary.get("protocols", {}).items()
    )
    return (
        f"<h2 id='good'>How good it is</h2><div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div>{notes}"
    )
