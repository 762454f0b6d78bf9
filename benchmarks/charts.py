"""Tables and figures for benchmarks.report, as HTML and SVG that need nothing else. Lines are
serve.reports.bench_page's.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from serve.reports.bench_page import INKS, short

WIDTH = 420


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
        parts.append(
            f'<rect x="146" y="{y}" width="{value / top * span:.1f}" height="16" fill="{INKS[row % len(INKS)]}"/>'
        )
        x = 150 + max(value, ceiling or 0) / top * span  # right of the dashed line
        parts.append(f'<text x="{x:.1f}" y="{y + 12}">{value:.4g} {html.escape(unit)}</text>')
    if ceiling:
        x = 146 + ceiling / top * span
        parts.append(f'<path d="M{x:.1f},18 V{height}" stroke="currentColor" stroke-dasharray="4 3"/>')
    return _figure(parts, height)


def _figure(parts: list[str], height: float, width: float = WIDTH) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<figure><svg role="img" {size}>{"".join(parts)}</svg></figure>'


def lanes(spans: list[tuple[str, float, float]]) -> str:
    """Rows of spans (row's name, start, end), in seconds, over one time axis from 0."""
    names, end = list(dict.fromkeys(name for name, _, _ in spans)), max((stop for *_, stop in spans), default=1)
    left, width, foot = 120, 2 * WIDTH, 22 * len(names) + 16
    scale, parts = (width - left) / end, []
    for row, lane in enumerate(names):
        parts.append(f'<text x="0" y="{row * 22 + 14}">{html.escape(lane)}</text>')
        ink = INKS[row % len(INKS)]
        for start, stop in ((a, b) for name, a, b in spans if name == lane):
            at = f'x="{left + start * scale:.1f}" y="{row * 22 + 3}"'
            parts.append(f'<rect {at} width="{max(0.3, (stop - start) * scale):.1f}" height="14" fill="{ink}"/>')
    for part, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        at = f'x="{left + part * end * scale:.1f}" y="{foot}" text-anchor="{anchor}"'
        parts.append(f"<text {at}>{short(part * end)} s</text>")
    return _figure(parts, foot + 6, width)


def roofline(points: dict[str, list[tuple[float, float]]], ridge: float) -> str:
    """Speed over operations a byte, both logarithmic, below a roof that is flat, at 1, from `ridge` on.

    `points`: by kind of operation, (operations a byte, share of the speed of the roof's flat part).
    """
    every = [point for kind in points.values() for point in kind]
    left = 10 ** math.floor(math.log10(min(x for x, _ in every)))
    right = 10 ** math.ceil(math.log10(max([ridge, *(x for x, _ in every)])))
    low = 10 ** math.floor(math.log10(min([left / ridge, *(y for _, y in every)])))
    height, edge, foot = 300, 56, 60

    def place(x: float, y: float) -> str:
        across = math.log(x / left) / math.log(right / left) * (WIDTH - edge - 10)
        up = math.log(y / low) / math.log(1 / low) * (height - foot - 24)
        return f"{edge + across:.1f},{height - foot - up:.1f}"

    flat = " ".join(place(x, min(1, x / ridge)) for x in (left, ridge, right))
    parts = [f'<polyline points="{flat}" fill="none" stroke="currentColor" stroke-dasharray="4 3"/>']
    for exponent in range(round(math.log10(left)), round(math.log10(right)) + 1):
        x = place(10**exponent, 1).split(",")[0]
        anchor = "end" if 10.0**exponent >= right else "middle"
        parts.append(f'<text x="{x}" y="{height - foot + 14}" text-anchor="{anchor}">{10.0**exponent:g}</text>')
    for exponent in range(round(math.log10(low)), 1):
        y = place(left, 10**exponent).split(",")[1]
        parts.append(f'<text x="{edge - 5}" y="{y}" text-anchor="end">{100 * 10.0**exponent:g} %</text>')
        parts.append(f'<path d="M{edge},{y} H{WIDTH - 10}" stroke="#8885"/>')
    for number, (kind, found) in enumerate(points.items()):
        ink = INKS[number % len(INKS)]
        for point in found:
            x, y = place(*point).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{ink}"/>')
        at = f'x="{edge + 120 * (number % 3)}" y="{height - 18 + 14 * (number // 3)}"'
        parts.append(f'<text {at} style="fill:{ink}">{html.escape(kind)}</text>')
    parts.append(f'<text x="{WIDTH}" y="{height - foot + 28}" text-anchor="end">operations a byte</text>')
    return _figure(parts, height)
