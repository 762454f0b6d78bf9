"""Draw docs/architecture.svg from the import graph: python scripts/import_graph.py (--check: is it current?)

Each package is a box, each arrow an import, drawn from the importing package to the imported one. A package stands to
the right of everything that it imports, so an arrow that points right would be an import in the wrong direction.
"""

from __future__ import annotations

import ast
import html
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "architecture.svg"
PACKAGES = {
    "kernels": "ops of encoder and UNet: references, Triton",
    "vlv": "the model, its checkpoints, its images",
    "export": "ONNX, TensorRT, TensorRT-RTX; engines",
    "serve": "batch command, server, gateway, page",
    "optimum": "a subcommand of optimum-cli",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, EDGE = 220, 52, 70, 26, 16


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package_name in PACKAGES:
        for path in sorted((ROOT / package_name).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package(name: str, known: dict[str, Path]) -> str:
    """The package that a module is drawn as: its own, or its top-level package where that is no package of ours."""
    while name not in known or known[name].name != "__init__.py":
        if "." not in name:
            return name
        name = name.rpartition(".")[0]
    return name


def imports(path: Path) -> set[str]:
    """What a file imports, nested imports included; `from a import b` as both a and a.b.

    Of import_module(f"kernels.triton.{name}"), which imports by name, the package that is written out.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            written = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found |= {str(text).rstrip(".") for text in written}
    return found


def graph() -> dict[str, set[str]]:
    """By package, the other packages that it imports."""
    known = modules()
    edges: dict[str, set[str]] = {package(name, known): set() for name in known}
    for name, path in known.items():
        here = package(name, known)
        there = {package(other, known) for other in imports(path) if other in known}
        edges[here] |= there - {here}
    return edges


def columns(edges: dict[str, set[str]]) -> list[list[str]]:
    """The packages from left to right: each as far left as what it imports lets it be.

    Packages that import each other share a column, as parts of one whole (a package and its subpackages).
    """

    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for other in edges[todo.pop()] - found:
                found.add(other)
                todo.append(other)
        return found

    below = {name: reached(name) for name in edges}
    depth: dict[str, int] = {}

    def place(name: str) -> int:
        if name not in depth:
            strictly = [other for other in below[name] if name not in below[other]]
            depth[name] = 1 + max(map(place, strictly), default=-1)
        return depth[name]

    result: list[list[str]] = [[] for _ in range(1 + max(map(place, edges)))]
    for name in sorted(edges):
        result[depth[name]].append(name)
    return result


def svg(edges: dict[str, set[str]]) -> str:
    """The drawing. An arrow that another path of arrows implies is left out where both ends are in order."""
    placed, rows = columns(edges), {}
    for x, names in enumerate(placed):
        for y, name in enumerate(names):
            rows[name] = (EDGE + x * (WIDTH + GAP_X), EDGE + y * (HEIGHT + GAP_Y))
    width = 2 * EDGE + len(placed) * (WIDTH + GAP_X) - GAP_X
    height = 2 * EDGE + max(map(len, placed)) * (HEIGHT + GAP_Y) - GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif">',
        "<title>Which package imports which</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#777"/></marker></defs>',
    ]
    for name in sorted(edges):
        for other in sorted(edges[name]):
            parts.append(_arrow(rows[name], rows[other]))
    for name, (x, y) in sorted(rows.items()):
        about = PACKAGES.get(name, "")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#eef3fb" stroke="#5b7fb5"/>'
        )
        parts.append(f'<text x="{x + 12}" y="{y + 21}" font-size="14" font-weight="bold" fill="#123">{name}</text>')
        parts.append(f'<text x="{x + 12}" y="{y + 40}" font-size="10" fill="#345">{html.escape(about)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From a box's left side to the other's right side; within a column, from edge to edge."""
    (x1, y1), (x2, y2) = start, end
    if x1 == x2:
        up = y2 < y1
        shift = WIDTH // 2 + (14 if up else -14)
        ends = (x1 + shift, y1 if up else y1 + HEIGHT, x2 + shift, y2 + HEIGHT if up else y2)
        path = "M{},{} L{},{}".format(*ends)
    else:
        x2 += WIDTH
        middle = (x1 + x2) // 2
        y1, y2 = y1 + HEIGHT // 2, y2 + HEIGHT // 2
        path = f"M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}"
    return f'<path d="{path}" fill="none" stroke="#777" marker-end="url(#a)"/>'


def main(argv: list[str]) -> int:
    drawing = svg(graph())
    if "--check" in argv:
        if OUT.exists() and OUT.read_text() == drawing:
            return 0
        print(f"error: {OUT.relative_to(ROOT)} is not current: run python scripts/import_graph.py", file=sys.stderr)
        return 1
    OUT.write_text(drawing)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
