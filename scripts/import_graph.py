"""Draw docs/architecture.svg from the source tree: python scripts/import_graph.py (--check: is it current?)

Each package is a frame with its folders and what they hold (the first sentence of their `__init__.py`); each arrow an
import, drawn from the importing package to the imported one.
"""

from __future__ import annotations

import ast
import html
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "architecture.svg"
PACKAGES = ("kernels", "vlv", "export", "serve")  # from left to right: each may import those before it
WIDTH, GAP, EDGE, TOP, LINE = 258, 46, 16, 74, 15
FONTS = {
    "title": 'font-size="15" font-weight="bold"',
    "folder": 'font-size="12" font-weight="bold"',
    "text": 'font-size="10"',
}


def imported_packages(package: str) -> set[str]:
    """Return the other packages of ours that a package's files import, nested imports included."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return (found & set(PACKAGES)) - {package}


def about(folder: Path) -> str:
    """Return the first sentence of a package's docstring."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def frame(package: str) -> list[tuple[str, str]]:
    """Return the lines of a package's frame as (style, text): its name, and each folder with what it holds."""
    lines = [("title", package), *(("text", line) for line in textwrap.wrap(about(ROOT / package), 44))]
    for init in sorted((ROOT / package).rglob("*/__init__.py")):
        folder = init.parent
        name = str(folder.relative_to(ROOT / package))
        lines += [("folder", f"{name}/"), *(("text", line) for line in textwrap.wrap(about(folder), 44))]
    return lines


def svg() -> str:
    """Return the drawing."""
    frames = {package: frame(package) for package in PACKAGES}
    left = {package: EDGE + i * (WIDTH + GAP) for i, package in enumerate(PACKAGES)}
    height = TOP + EDGE + max(sum(22 if style == "folder" else LINE for style, _ in f) for f in frames.values()) + 22
    width = 2 * EDGE + len(PACKAGES) * (WIDTH + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif">',
        "<title>Packages, their folders, and which package imports which</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#777"/></marker></defs>',
    ]
    for i, package in enumerate(PACKAGES):
        for other in sorted(imported_packages(package)):
            start, end = left[package] + WIDTH // 2, left[other] + WIDTH // 2
            rise = TOP - 20 * abs(i - PACKAGES.index(other))
            path = f"M{start},{TOP} C{start},{rise} {end},{rise} {end},{TOP}"
            parts.append(f'<path d="{path}" fill="none" stroke="#777" marker-end="url(#a)"/>')
    for package, lines in frames.items():
        x, y = left[package], TOP
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{height - TOP - EDGE}" rx="8" fill="#eef3fb" '
            'stroke="#5b7fb5"/>'
        )
        for style, text in lines:
            y += 22 if style == "folder" else LINE + 6 * (style == "title")
            parts.append(f'<text x="{x + 12}" y="{y}" {FONTS[style]} fill="#123">{html.escape(text)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(argv: list[str]) -> int:
    drawing = svg()
    if "--check" in argv:
        if OUT.exists() and OUT.read_text() == drawing:
            return 0
        print(f"error: {OUT.relative_to(ROOT)} is not current: run python scripts/import_graph.py", file=sys.stderr)
        return 1
    OUT.write_text(drawing)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
