"""Build self-contained HTML pages in one style, light and dark, for galleries, reports and benchmarks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """\
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --ground: #f5f5f7; --card: #fff; --line: #d8d8dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f2f2f4; --soft: #9a9aa0; --ground: #131315; --card: #1f1f22; --line: #3a3a3f; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; } h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; vertical-align: top; margin: .5rem 1rem .5rem 0; }
img, svg { max-width: 100%; }
small, figcaption, .about, .none { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
svg { color: var(--soft); } svg text { fill: currentColor; font-size: 11px; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Return an HTML document; `style` is CSS after STYLE. `title` is escaped, `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return rows of cells under their head as an HTML table; all text is escaped."""
    heads = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
