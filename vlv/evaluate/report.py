"""One HTML page of the results of the other commands, with nothing outside it.

python -m vlv.evaluate report images.json judged.json vqa.json benchmarks/bottleneck.json -o report.html
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path

from vlv.common.html import page
from vlv.evaluate import charts, cli

STYLE = """\
section { background: var(--card); border-radius: .7rem; padding: 1rem; margin: 1rem 0; overflow-x: auto; }
section h2 { margin: 0; }
p, code { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.strip { display: flex; gap: .3rem; } .strip img { width: 6rem; image-rendering: pixelated; border-radius: .3rem; }
svg .axis { stroke: var(--line); }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = cli.Parser("report", __doc__)
    p.add_argument("results", nargs="+", type=Path, metavar="JSON", help="results of the other commands")
    return cli.run(p, _report, argv)


def _report(args: argparse.Namespace) -> int:
    if not args.out:
        raise cli.Misuse("-o FILE.html is needed: where the page goes")
    sections = []
    for file in args.results:
        try:
            found = json.loads(file.read_text())
            sections.append(_section(file.name, found, RENDERERS[found["kind"]](found)))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no result of these commands ({type(error).__name__}: {error})") from error
    cli.write_text(page("VLV evaluation", "\n".join(sections), STYLE), args.out)
    print(args.out)
    return 0


def _section(name: str, found: dict, body: str) -> str:
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
    """A figure as text; an interval as mean and bounds; a dash for what could not be measured."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        if value["mean"] is None:
            return number(None)
        return f"{number(value['mean'])} [{number(value['low'])}, {number(value['high'])}]"
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """Rows of figures; the columns are the keys, in the order in which they appear."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    head = "".join(f"<th>{html.escape(c.replace('_', ' '))}</th>" for c in columns)
    lines = ["".join(f"<td>{html.escape(number(row.get(c)))}</td>" for c in columns) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def flat(row: dict) -> dict:
    """A row whose nested figures stand beside the others; intervals stay whole."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict) and "mean" not in value:
            found |= {f"{name} {k}": v for k, v in value.items()}
        else:
            found[name] = value
    return found


def images(found: dict) -> str:
    rows = [flat(row) for row in found["rows"]]
    curves = charts.of_rows([r for r in rows if not r["control"]], "guidance") if len(rows) > 1 else ""
    strips = "".join(_strip(e["label"], e["files"]) for e in found["examples"])
    return table(rows) + curves + strips


def judge(found: dict) -> str:
    parts = []
    if "rubric" in found:
        parts.append("<h3>Rubric, 0 to 6</h3>" + table([{"system": n} | g for n, g in found["rubric"].items()]))
    if "pairs" in found:
        parts.append("<h3>Blind pairs</h3>" + table([{"pair": n} | c for n, c in found["pairs"].items()]))
    return "".join(parts) + table([found["usage"]])


def vqa(found: dict) -> str:
    return table([flat(row) for row in found["rows"]]) + table([found["usage"]])


def named_rows(found: dict) -> str:
    return table([{"system": name} | row for name, row in found["rows"].items()])


def scenes(found: dict) -> str:
    rows = []
    for part in ("captions", "reconstructions"):
        rows += [{"figure": f"{part}: {k}", "value": v} for k, v in found.get(part, {}).items() if k != "samples"]
    samples = "".join(f"<li>{html.escape(text)}</li>" for text in found.get("captions", {}).get("samples", []))
    return table(rows) + (f"<ul>{samples}</ul>" if samples else "")


def bottleneck(found: dict) -> str:
    rows = [flat(point) for point in found["points"]]
    most = max(row["images"] for row in rows)
    queries = charts.of_rows([r for r in rows if r["images"] == most], "queries", only="right ")
    width = found["settings"]["text_positions"]
    data = charts.of_rows([r for r in rows if r["queries"] == width], "images", only="right ")
    return table(rows) + queries + data


RENDERERS = {
    "images": images, "judge": judge, "vqa": vqa, "layout": named_rows, "references": named_rows, "scenes": scenes,
    "bottleneck": bottleneck,
}  # fmt: skip


def _strip(label: str, files: list[str]) -> str:
    """Small pictures in a row, those that are still there."""
    from PIL import Image

    shown = []
    for file in filter(Path.is_file, map(Path, files)):
        image = Image.open(file).convert("RGB")
        image.thumbnail((192, 192))
        stream = io.BytesIO()
        image.save(stream, "png")
        data = base64.b64encode(stream.getvalue()).decode()
        shown.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(file.stem)}">')
    return f'<h3>{html.escape(label)}</h3><div class="strip">{"".join(shown)}</div>' if shown else ""
