"""All committed figures on one page that needs nothing but a browser: python -m benchmarks.report -o out/report.html

Reads benchmarks/*.json and benchmarks/training/*.json; --load, --trace and --artifacts add what serve.bench,
serve.vllm_caption --trace and the exports have written. A section without figures says which command makes them.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
INK = ("#2f5d9b", "#2f7d4f", "#b8860b", "#b03a2e")
WIDTH, HEIGHT, EDGE = 420, 200, 46

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>VLV captioning toolkit: what was measured</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 2rem auto; max-width: 62rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884; }}
td + td {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ display: inline-block; vertical-align: top; margin: .5rem 1rem .5rem 0; }}
img, svg {{ max-width: 100%; }}
text {{ fill: currentColor; font-size: 11px; }}
small, .none {{ opacity: .75; }}
</style>
<h1>What was measured</h1>
{sections}
</html>
"""


def table(rows: Iterable[Iterable]) -> str:
    """Rows of cells, the first row as heads."""
    parts = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        parts.append("<tr>" + "".join(f"<{cell}>{html.escape(str(value))}" for value in row))
    return f"<table>{''.join(parts)}</table>"


def bars(title: str, values: dict[str, float], unit: str, ceiling: float | None = None) -> str:
    """Horizontal bars; a ceiling is a dashed line."""
    top, step = max([*values.values(), ceiling or 0]) or 1, 26
    height, span = 30 + step * len(values), WIDTH - 230
    parts = [f'<text x="0" y="12">{html.escape(title)}</text>']
    for row, (name, value) in enumerate(values.items()):
        y = 24 + row * step
        parts.append(f'<text x="140" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<rect x="146" y="{y}" width="{value / top * span:.1f}" height="16" fill="{INK[row % 4]}"/>')
        parts.append(f'<text x="{150 + value / top * span:.1f}" y="{y + 12}">{value:.4g} {html.escape(unit)}</text>')
    if ceiling:
        x = 146 + ceiling / top * span
        parts.append(f'<path d="M{x:.1f},18 V{height}" stroke="currentColor" stroke-dasharray="4 3"/>')
    return _figure(parts, height)


def curve(title: str, x: list[float], y: list[float], ink: str = INK[0]) -> str:
    """A line over x; y from 0."""
    top, right = max(y) or 1, max(x) or 1
    points = [
        f"{EDGE + a / right * (WIDTH - EDGE - 10):.1f},{HEIGHT - 26 - b / top * (HEIGHT - 50):.1f}"
        for a, b in zip(x, y, strict=True)
    ]
    parts = [
        f'<text x="{EDGE}" y="12">{html.escape(title)}</text>',
        f'<text x="{EDGE - 5}" y="28" text-anchor="end">{top:,.4g}</text>',
        f'<text x="{EDGE - 5}" y="{HEIGHT - 24}" text-anchor="end">0</text>',
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">{right:,.0f}</text>',
        f'<path d="M{EDGE},24 V{HEIGHT - 26} H{WIDTH - 10}" fill="none" stroke="#8888"/>',
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{ink}" stroke-width="1.5"/>',
    ]
    return _figure(parts, HEIGHT)


def _figure(parts: list[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f'<figure><svg role="img" {size}>{"".join(parts)}</svg></figure>'


def encoder(report: dict) -> str:
    """Speed beside its ceiling, and the error beside the speed."""
    run = report["runs"][0]
    images = {name: 60 / run["seconds"][name]["median"] for name in ("ours", "eager", "sdpa")}
    work = {"reached": run["operations_per_s"] / 1e9}
    rows = [
        ("", "ours", "transformers (eager)"),
        ("peak memory, GB", *(f"{run['peak_rss'][n] / 1e9:.2f}" for n in ("ours", "eager"))),
    ]
    error = run["error"]["ours_to_theirs"]
    return (
        bars("Images a minute, full size, float32, two cores", images, "/min")
        + bars(
            f"Work a second; {run['of_ceiling']:.0%} of the matmul ceiling (dashed)",
            work,
            "GFLOP/s",
            run["matmul_ceiling_per_s"] / 1e9,
        )
        + table(rows)
        + f"<p>Relative error against theirs: {error['max']:.1e} at most, {error['rms']:.1e} RMS.</p>"
    )


def captions(report: dict) -> str:
    """Throughput against what one would run instead, and memory over a long run."""
    parts = report["parts"]
    names = {"road": "this toolkit", "greedy": "transformers, greedy", "published": "published, beam 4"}
    rates = {names[name]: parts[name]["images_per_second"] for name in names}
    images, memory = parts["memory"]["images"], parts["memory"]["curve_mib"]
    return (
        bars("Captions a second, bundled checkpoint", rates, "/s")
        + curve(f"MiB of all processes, sampled over {images:,} images", [*range(len(memory))], memory)
        + f"<p>First caption after {parts['startup']['first_caption_seconds']:.0f} s; equal to the reference's: "
        f"{html.escape(report['road_captions_equal_to_greedy'])}.</p>"
    )


def scenes(report: dict) -> str:
    """What is right in captions and reconstructions of scenes never seen."""
    words, drawn = report["captions"], report["reconstructions"]
    shares = {name: 100 * words[name] for name in ("objects", "count", "background", "sizes", "places", "relation")}
    seen = {
        "from its embeddings": 100 * drawn["objects_named"],
        "from another's": 100 * drawn["objects_named_shuffled"],
    }
    return bars(f"Right in {report['scenes']} held-out captions", shares, "%") + bars(
        "Objects found in reconstructions", seen, "%"
    )


def training(reports: dict[str, dict]) -> str:
    """The loss of each stage over its steps."""
    found = []
    for (name, report), ink in zip(reports.items(), INK, strict=False):
        points = report["history"]
        found.append(curve(f"{name}: loss over steps", [p["step"] for p in points], [p["loss"] for p in points], ink))
    return "".join(found)


def scale(report: dict) -> str:
    """The simulation of a large run, with its assumptions."""
    first = report["runs"][0]["assumed"]
    rows = [("assumed images/s a GPU", "days", "GPU hours", "cost", "read, Gbit/s", "decoding cores a GPU")]
    for run in report["runs"]:
        found = run["found"]
        cells = (
            found["days"],
            found["gpu_hours"],
            found["cost"],
            found["read_gbit_per_second"],
            run["decode_cores_per_gpu"],
        )
        rows.append((run["assumed"]["rate"], *(f"{value:,.1f}" for value in cells)))
    about = (
        f"{first['images']:,} images on {first['gpus']} GPUs at {first['price']:g} an hour: simulated, not measured."
    )
    return f"<p>{about}</p>{table(rows)}"


def load(report: dict) -> str:
    """serve.bench's answers at each offered rate."""
    x = [point["offered_per_second"] for point in report["sweep"]]
    lines = {"Seconds to the end, p50": [p["e2e"]["p50"] or 0 for p in report["sweep"]]}
    lines["Answered a second"] = [p["answered_per_second"] for p in report["sweep"]]
    return "".join(curve(f"{name}, over requests offered a second", x, y) for name, y in lines.items())


def timeline(events: list[dict]) -> str:
    """When each stage worked, from a --trace."""
    events = [event for event in events if event["ph"] == "X"]
    lanes = list(dict.fromkeys(event["cat"] for event in events))
    end = max((e["ts"] + e["dur"] for e in events), default=1)
    parts = []
    for row, lane in enumerate(lanes):
        parts.append(f'<text x="0" y="{row * 22 + 14}">{html.escape(lane)}</text>')
        for event in (e for e in events if e["cat"] == lane):
            x, width = 120 + event["ts"] / end * (WIDTH - 120), max(0.3, event["dur"] / end * (WIDTH - 120))
            parts.append(
                f'<rect x="{x:.1f}" y="{row * 22 + 3}" width="{width:.1f}" height="14" fill="{INK[row % 4]}"/>'
            )
    return _figure(parts, 22 * len(lanes) + 8) + f"<p>{end / 1e6:.1f} s in all.</p>"


def drift(manifest: dict) -> str:
    """Each artifact's distance from float32, at its worst output, from a manifest."""
    rows = [("artifact", "precision", "max rel. error", "RMS", "greedy tokens kept")]
    for name, entry in manifest["artifacts"].items():
        checks = entry.get("verification") or {}
        outputs = list(checks.get("outputs", {}).values())
        worst = [f"{max(o[key] for o in outputs):.1e}" if outputs else "–" for key in ("max", "rms")]
        kept = (checks.get("captions") or {}).get("agreement")
        rows.append((name, entry["precision"], *worst, "–" if kept is None else f"{kept:.1%}"))
    return table(rows)


def section(title: str, draw, source: Path | None, command: str) -> str:
    """A part of the page from one JSON file, or the command that makes it."""
    head = f"<h2>{html.escape(title)}</h2>"
    if source is None or not source.is_file():
        return f'{head}<p class="none">Not measured yet: <code>{html.escape(command)}</code></p>'
    report = json.loads(source.read_text())
    about = report if isinstance(report, dict) else {}
    machine = about.get("machine", about)
    on = ", ".join(str(machine[k]) for k in ("cpu", "cores", "commit") if k in machine)
    made = html.escape(f"{about.get('command', command)} ({on})" if on else command)
    return f"{head}{draw(report)}<p><small>{made}</small></p>"


def page(load_json: Path | None = None, trace: Path | None = None, artifacts: Path | None = None) -> str:
    """The whole page."""
    stages = {f.stem: json.loads(f.read_text()) for f in sorted((FOLDER / "training").glob("*.json"))}
    manifest = artifacts / "manifest.json" if artifacts else None
    gallery = FOLDER.parent / "docs" / "gallery.png"
    sections = [
        section("The encoder", encoder, FOLDER / "encoder_cpu.json", "python -m benchmarks.encoder_cpu"),
        section("Captioning", captions, FOLDER / "caption.json", "python benchmarks/caption.py"),
        section(
            "What the bundled checkpoint has learned", scenes, FOLDER / "scenes.json", "python -m vlv.evaluate.scenes"
        ),
        f"<h2>Its training</h2>{training(stages)}",
        section("Under load", load, load_json, "python -m serve.bench PICTURES --url URL -o bench.json, then --load"),
        section(
            "Where the time goes", timeline, trace, "python -m serve.vllm_caption ... --trace trace.json, then --trace"
        ),
        section("Precision and drift", drift, manifest, "python -m export.onnx --precision fp16 ..., then --artifacts"),
        section(
            "A billion pictures", scale, FOLDER / "scale.json", "python -m benchmarks.scale -o benchmarks/scale.json"
        ),
    ]
    if gallery.is_file():
        data = base64.b64encode(gallery.read_bytes()).decode()
        about = "A picture, what is drawn from its embeddings alone, and its caption."
        sections.append(f'<h2>Gallery</h2><img alt="{about}" src="data:image/png;base64,{data}"><p>{about}</p>')
    return PAGE.format(sections="\n".join(sections))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="All figures on one page.")
    p.add_argument("-o", "--output", type=Path, default=Path("out/report.html"), metavar="HTML")
    p.add_argument("--load", type=Path, metavar="JSON", help="what serve.bench wrote")
    p.add_argument("--trace", type=Path, metavar="JSON", help="what serve.vllm_caption --trace wrote")
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="folder of exports")
    args = p.parse_args(argv)
    for given in (args.load, args.trace, args.artifacts):
        if given is not None and not given.exists():
            print(f"error: there is no {given}", file=sys.stderr)
            return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(page(args.load, args.trace, args.artifacts), encoding="utf-8")
    os.replace(temporary, args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
