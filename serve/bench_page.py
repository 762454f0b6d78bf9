"""serve.bench's figures as one page that needs nothing but a browser: a table, and a plot for each measure."""

from __future__ import annotations

import html

WIDTH, HEIGHT, EDGE = 420, 220, 44
COLOURS = {"p50": "#2f7d4f", "p90": "#b8860b", "p99": "#b03a2e", "answered": "#2f5d9b", "within the SLO": "#2f7d4f"}
NAMES = {
    "ttft": "Seconds to the first token", "tpot": "Seconds per further token", "itl": "Seconds between pieces",
    "e2e": "Seconds to the end",
}  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captioning under load</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; }}
figure {{ display: inline-block; margin: 1rem 1rem 0 0; }}
svg {{ max-width: 100%; }}
text {{ fill: currentColor; font-size: 11px; }}
</style>
<h1>Captioning under load</h1>
<p>{about}</p>
<table>{table}</table>
{plots}
</html>
"""


def page(report: dict) -> str:
    """The report of serve.bench as HTML."""
    sweep, slo = report["sweep"], report["slo"]
    rates = [point["offered_per_second"] for point in sweep]
    answered = {"answered": "answered_per_second", "within the SLO": "goodput_per_second"}
    plots = [plot("Captions a second", rates, {k: [p[name] for p in sweep] for k, name in answered.items()})]
    for measure, title in NAMES.items():
        plots.append(plot(title, rates, {q: [p[measure][q] for p in sweep] for q in ("p50", "p90", "p99")}))
    about = (
        f"Model {report['model']}, {report['seconds']} s of Poisson arrivals at each rate, streamed, at most "
        f"{report['max_tokens']} tokens. SLO: first token within {slo['ttft']:g} s, end within {slo['e2e']:g} s."
    )
    return PAGE.format(about=html.escape(about), table=_table(sweep), plots="\n".join(plots))


def _table(sweep: list[dict]) -> str:
    heads = ["offered/s", "answered/s", "goodput/s", "tokens/s/device", "TTFT p50", "TTFT p99", "e2e p50", "e2e p99"]
    rows = ["".join(f"<th>{head}" for head in [*heads, "cost of 1,000", "answers"])]
    for point in sweep:
        names = ("offered_per_second", "answered_per_second", "goodput_per_second", "tokens_per_second_per_device")
        cells = [point[name] for name in names]
        cells += [point[measure][q] for measure in ("ttft", "e2e") for q in ("p50", "p99")]
        cells += [point["cost_per_1000"], ", ".join(f"{n} x {status}" for status, n in point["statuses"].items())]
        rows.append("".join(f"<td>{html.escape('–' if cell is None else str(cell))}" for cell in cells))
    return "".join(f"<tr>{row}" for row in rows)


def plot(title: str, x: list[float], lines: dict[str, list[float | None]]) -> str:
    """Lines over the offered rate, as SVG."""
    top = max((v for values in lines.values() for v in values if v is not None), default=0) or 1
    right = max(x)

    def place(a: float, b: float) -> str:
        return f"{EDGE + a / right * (WIDTH - EDGE - 10):.1f},{HEIGHT - EDGE - b / top * (HEIGHT - EDGE - 20):.1f}"

    parts = [f'<text x="{EDGE}" y="12">{html.escape(title)}</text>']
    for part in (0, 0.5, 1):
        at_x, at_y = place(part * right, 0).split(",")[0], place(0, part * top).split(",")[1]
        parts.append(f'<text x="{at_x}" y="{HEIGHT - EDGE + 14}" text-anchor="middle">{part * right:.3g}</text>')
        parts.append(f'<text x="{EDGE - 5}" y="{at_y}" text-anchor="end">{part * top:.3g}</text>')
        parts.append(f'<path d="M{EDGE},{at_y} H{WIDTH - 10}" stroke="#8885"/>')
    for number, (name, values) in enumerate(lines.items()):
        points = [place(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{COLOURS[name]}"/>' for p in points
        ]
        left = EDGE + 110 * number
        parts.append(f'<text x="{left}" y="{HEIGHT - 8}" style="fill:{COLOURS[name]}">{html.escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">offered a second</text>')
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></figure>'
    )
