"""The rooms build on each other in one direction: kernels <- vlv <- export <- serve."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["kernels", "vlv", "export", "serve"]  # each may import itself and those before it
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(tree: ast.AST) -> set[tuple[int, str]]:
    """Line and top-level package of every absolute import, nested ones included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name.split(".")[0]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.lineno, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_nothing_above_its_room(path: Path) -> None:
    room = ROOMS.index(path.relative_to(ROOT).parts[0])
    above = {*ROOMS[room + 1 :], "tests", "benchmarks", "scripts"}
    wrong = [
        f"{path.name}:{line} imports {name}" for line, name in imported(ast.parse(path.read_text())) if name in above
    ]
    assert not wrong, f"{ROOMS[room]} may import {ROOMS[: room + 1]}: {wrong}"


def test_nested_imports_are_seen() -> None:
    tree = ast.parse("import a.b\ndef f():\n    from c.d import e\n    from . import g")
    assert imported(tree) == {(1, "a"), (3, "c")}
