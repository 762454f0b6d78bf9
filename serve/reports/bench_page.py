"""Write the report of serve.bench as one page that works offline: a table, and a plot for each measure."""

from __future__ import annotations

import html

from vlv.common import html as pages

WIDTH, HEIGHT, EDGE = 420, 236, 60  # EDGE: left and below, for the labels of the axes
INKS = ("#2f5d9b", "#2f7d4f", "#b8860b", "#b03a2e", "#7a4f9b", "#4a8f96")
COLOURS = {"p50": "#2f7d4f", "p90": "#b8860b", "p99": "#b03a2e", "answered": "#2f5d9b", "within the SLO": "#2f7d4f"}
NAMES = {
    "ttft": "Seconds to the first token",
    "tpot": "Seconds per further token",
    "itl": "Seconds between pieces",
    "e2e": "Seconds to the end",
}


def page(report: dict) -> str:
    """Return the report of serve.bench as HTML."""
    about, plots = html.escape(conditions(report)), "\n".join(curves(report["sweep"]))
    body = f"<p>{about}</p>\n<table>{_table(report['sweep'])}</table>\n{plots}"
    return pages.page("Captioning under load", body)


def conditions(report: dict) -> str:
    """Return one paragraph about how the sweep was measured."""
    slo = report["slo"]
    return (
        f"Model {report['model']}, {report['seconds']} s of Poisson arrivals at each rate, streamed, at most "
        f"{report['max_tokens']} tokens. SLO: first token within {slo['ttft']:g} s, end within {slo['e2e']:g} s."
    )


def curves(sweep: list[dict]) -> list[str]:
    """Return plots of the throughput and of each measure over the offered rate."""
    rates = [point["offered_per_second"] for point in sweep]
    answered = {"answered": "answered_per_second", "within the SLO": "goodput_per_second"}
    plots = [plot("Captions per second (1/s)", rates, {k: [p[name] for p in sweep] for k, name in answered.items()})]
    for measure, title in NAMES.items():
        plots.append(plot(title, rates, {q: [p[measure][q] for p in sweep] for q in ("p50", "p90", "p99")}))
    return plots


def _table(sweep: list[dict]) -> str:
    heads = [
        "offered/s",
        "answered/s",
        "goodput/s",
        "tokens/s/device",
        "TTFT p50 (s)",
        "TTFT p99 (s)",
        "e2e p50 (s)",
        "e2e p99 (s)",
    ]
    rows = ["".join(f"<th>{head}" for head in [*heads, "cost of 1,000", "responses"])]
    for point in sweep:
        names = ("offered_per_second", "answered_per_second", "goodput_per_second", "tokens_per_second_per_device")
        cells = [point[name] for name in names]
        cells += [point[measure][q] for measure in ("ttft", "e2e") for q in ("p50", "p99")]
        cells += [point["cost_per_1000"], ", ".join(f"{n} x {status}" for status, n in point["statuses"].items())]
        rows.append("".join(f"<td>{html.escape('–' if cell is None else str(cell))}" for cell in cells))
    return "".join(f"<tr>{row}" for row in rows)


def plot(title: str, x: list[float], lines: dict[str, list[float | None]], below: str = "offered rate (1/s)") -> str:
    """Return lines over x as SVG; both axes begin at 0, `below` is the label of x."""
    y_max = max((v for values in lines.values() for v in values if v is not None), default=0) or 1
    x_max = max(x)

    def point(a: float, b: float) -> str:
        return f"{EDGE + a / x_max * (WIDTH - EDGE - 10):.1f},{HEIGHT - EDGE - b / y_max * (HEIGHT - EDGE - 20):.1f}"

    parts = [f'<text x="{EDGE}" y="12">{html.escape(title)}</text>']
    for part in (0, 0.5, 1):
        at_x, at_y = point(part * x_max, 0).split(",")[0], point(0, part * y_max).split(",")[1]
        anchor = "end" if part == 1 else "middle"
        parts.append(f'<text x="{at_x}" y="{HEIGHT - EDGE + 14}" text-anchor="{anchor}">{short(part * x_max)}</text>')
        parts.append(f'<text x="{EDGE - 5}" y="{at_y}" text-anchor="end">{short(part * y_max)}</text>')
        parts.append(f'<path d="M{EDGE},{at_y} H{WIDTH - 10}" stroke="#8885"/>')
    for number, (name, values) in enumerate(lines.items()):
        colour = COLOURS.get(name, INKS[number % len(INKS)])
        points = [point(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) < 40:
            parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in points]
        left = EDGE + 110 * number
        parts.append(f'<text x="{left}" y="{HEIGHT - 8}" style="fill:{colour}">{html.escape(name)}</text>')
    middle = (EDGE + WIDTH - 10) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - EDGE + 30}" text-anchor="middle">{html.escape(below)}</text>')
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></figure>'
    )


def short(value: float) -> str:
    """Return a number with three significant digits, for the label of an axis."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
