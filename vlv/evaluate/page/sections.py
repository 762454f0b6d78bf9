"""Render the results of each command as a section of the report."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from vlv.common.html import html_table
from vlv.data.image import decode
from vlv.evaluate.page.charts import charts

STYLE = """\
section { background: var(--card); border-radius: .7rem; padding: 1rem; margin: 1rem 0; overflow-x: auto; }
section h2 { margin: 0; }
p, code { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.strip { display: flex; gap: .3rem; } .strip img { width: 6rem; image-rendering: pixelated; border-radius: .3rem; }
svg .axis { stroke: var(--line); }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
"""


def section(name: str, found: dict) -> str:
    """Render the results of one file as a section. Raises KeyError, TypeError or AttributeError for other content."""
    body = RENDERERS[found["kind"]](found)
    about = {
        k: v for k, v in found.items() if isinstance(v, str | int | float) and k not in ("kind", "command", "what")
    }
    facts = ", ".join(f"{k} {v}" for k, v in about.items())
    head = f"{name}: {facts}" if facts else name
    parts = [f"<h2>{html.escape(found['kind'])}</h2><p>{html.escape(head)}</p>"]
    parts += [f"<p>{html.escape(found['what'])}</p>"] if "what" in found else []
    parts += [body, f"<p><code>{html.escape(found.get('command', ''))}</code></p>"]
    if failures := found.get("failures"):
        parts.append(f"<p>{len(failures)} failed, such as {html.escape(next(iter(failures.values())))}</p>")
    return f"<section>{''.join(parts)}</section>"


def number(value: object) -> str:
    """Return a figure as text; an interval as mean and bounds; a dash for what could not be measured."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        if value["mean"] is None:
            return number(None)
        return f"{number(value['mean'])} [{number(value['low'])}, {number(value['high'])}]"
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: list[dict]) -> str:
    """Render rows of figures; the columns are the keys, in the order in which they appear."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    return html_table([c.replace("_", " ") for c in columns], [[number(row.get(c)) for c in columns] for row in rows])


def flat(row: dict) -> dict:
    """Return a row whose nested figures stand beside the others; intervals stay together."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict) and "mean" not in value:
            found |= {f"{name} {k}": v for k, v in value.items()}
        else:
            found[name] = value
    return found


def images(found: dict) -> str:
    """Render the sweep, its curves, and examples."""
    rows = [flat(row) for row in found["rows"]]
    curves = charts([r for r in rows if not r["control"]], "guidance") if len(rows) > 1 else ""
    strips = "".join(_strip(e["label"], e["files"]) for e in found["examples"])
    return _table(rows) + curves + strips


def judge(found: dict) -> str:
    """Render rubric and pairs."""
    parts = []
    if "rubric" in found:
        parts.append("<h3>Rubric, 0 to 6</h3>" + _table([{"system": n} | g for n, g in found["rubric"].items()]))
    if "pairs" in found:
        parts.append("<h3>Blind pairs</h3>" + _table([{"pair": n} | c for n, c in found["pairs"].items()]))
    return "".join(parts) + _table([found["usage"]])


def vqa(found: dict) -> str:
    """Render accuracies."""
    return _table([flat(row) for row in found["rows"]]) + _table([found["usage"]])


def named_rows(found: dict) -> str:
    """Render rows that are named by their system."""
    return _table([{"system": name} | row for name, row in found["rows"].items()])


def scenes(found: dict) -> str:
    """Render captions and reconstructions of synthetic scenes."""
    rows = []
    for part in ("captions", "reconstructions"):
        rows += [{"figure": f"{part}: {k}", "value": v} for k, v in found.get(part, {}).items() if k != "samples"]
    samples = "".join(f"<li>{html.escape(text)}</li>" for text in found.get("captions", {}).get("samples", []))
    return _table(rows) + (f"<ul>{samples}</ul>" if samples else "")


def bottleneck(found: dict) -> str:
    """Render the sweeps of benchmarks.bottleneck."""
    rows = [flat(point) for point in found["points"]]
    largest = max(row["images"] for row in rows)
    queries = charts([r for r in rows if r["images"] == largest], "queries", prefix="right ")
    width = found["settings"]["text_positions"]
    data = charts([r for r in rows if r["queries"] == width], "images", prefix="right ")
    return _table(rows) + queries + data


RENDERERS = {
    "images": images,
    "judge": judge,
    "vqa": vqa,
    "layout": named_rows,
    "references": named_rows,
    "scenes": scenes,
    "bottleneck": bottleneck,
}


def _strip(label: str, files: list[str]) -> str:
    """Render the files that still exist as small images in a row."""
    shown = []
    for file in filter(Path.is_file, map(Path, files)):
        image = decode(file)
        image.thumbnail((192, 192))
        stream = io.BytesIO()
        image.save(stream, "png")
        data = base64.b64encode(stream.getvalue()).decode()
        shown.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(file.stem)}">')
    return f'<h3>{html.escape(label)}</h3><div class="strip">{"".join(shown)}</div>' if shown else ""
