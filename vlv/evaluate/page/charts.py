"""Small line charts as inline SVG, for the report."""

from __future__ import annotations

import html

WIDTH, HEIGHT, LEFT, BOTTOM = 260, 150, 44, 30
COLOR = "#3b82f6"


def charts(rows: list[dict], x: str, prefix: str = "") -> str:
    """Return a chart for each figure of the rows whose name begins with `prefix`, over the column `x`."""
    rows = sorted((r for r in rows if isinstance(r.get(x), int | float)), key=lambda r: r[x])
    figures = [k for k, v in rows[0].items() if isinstance(v, float) and k != x] if rows else []
    names = [k for k in figures if k.startswith(prefix) and not k.endswith("_std")]
    curves = [chart([(r[x], r[name]) for r in rows if r.get(name) is not None], name, x) for name in names]
    return f'<div class="charts">{"".join(curves)}</div>' if len(rows) > 1 else ""


def chart(points: list[tuple[float, float]], title: str, x: str) -> str:
    """Return one curve. Points have equal distances, since most sweeps are by factors; each is labelled with its x."""
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    step = (WIDTH - LEFT - 20) / max(1, len(points) - 1)
    points_xy = [
        (LEFT + 10 + i * step, 20 + (high - v) / span * (HEIGHT - BOTTOM - 28)) for i, (_, v) in enumerate(points)
    ]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points_xy)
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{COLOR}"/>' for a, b in points_xy)
    marks = "".join(
        f'<text x="{a:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{value:g}</text>'
        for (a, _), (value, _) in zip(points_xy, points, strict=True)
    )
    ends = [(20, high), (HEIGHT - BOTTOM - 8, low)]
    scale = "".join(f'<text x="{LEFT - 2}" y="{y + 4}" text-anchor="end">{v:.3g}</text>' for y, v in ends)
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(title)} over {html.escape(x)}">'
        f'<text x="{LEFT}" y="10">{html.escape(title)}</text>{scale}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<polyline points="{line}" fill="none" stroke="{COLOR}" stroke-width="1.5"/>{dots}{marks}'
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{html.escape(x)}</text></svg>'
    )
