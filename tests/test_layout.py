"""The layout of docs/architecture.md: import directions, no cycles, small folders, thin commands, docstrings."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["kernels", "vlv", "export", "serve"]  # each may import itself and those before it
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MAX_LINES = 600
MAX_MODULES = 14  # in one folder, not counting __init__.py and __main__.py
FOREIGN_PATHS = ["/work/", "index-url", "find-links"]


def git(*args: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr  # git grep: 1 is "nothing found"
    return run.stdout.splitlines()


def python_files() -> list[Path]:
    return [ROOT / name for name in git("ls-files", "*.py") if (ROOT / name).exists()]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[tuple[int, str]]:
    """Return line and dotted name of every absolute import, nested ones included; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.lineno, node.module))
            found |= {(node.lineno, f"{node.module}.{alias.name}") for alias in node.names}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Return, by module, the modules of ours that it imports; of `from a import b`, a.b where b is a module, else a."""
    edges: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in trees else node.module for one in full}
        edges[name] = (found & trees.keys()) - {name}
    return edges


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(edges):
        if module not in order:
            visit(module)
    return groups


def is_command(path: Path) -> bool:
    """Return True for a file that is run by name: it defines `main`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree_of(path).body)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_nothing_above_its_package(path: Path) -> None:
    package = PACKAGES.index(path.relative_to(ROOT).parts[0])
    above = {*PACKAGES[package + 1 :], "tests", "benchmarks", "scripts"}
    wrong = sorted({
        f"{path.name}:{line} imports {name}" for line, name in imported(tree_of(path)) if name.split(".")[0] in above
    })  # fmt: skip
    assert not wrong, f"{PACKAGES[package]} may import {PACKAGES[: package + 1]}: {wrong}"


def test_nested_imports_are_seen() -> None:
    tree = ast.parse("import a.b\ndef f():\n    from c.d import e\n    from . import g")
    assert imported(tree) == {(1, "a.b"), (3, "c.d"), (3, "c.d.e")}


def test_no_import_cycles() -> None:
    """Nested imports count: a cycle that a late import hides is still one."""
    assert not cycles(graph({module_name(path): tree_of(path) for path in FILES}))


def test_cycles_are_found() -> None:
    sources = {"a": "from b import x", "b": "def f():\n    import c", "c": "import a", "d": "import a"}
    assert cycles(graph({name: ast.parse(source) for name, source in sources.items()})) == [["a", "b", "c"]]


def test_folders_are_small() -> None:
    modules = [path for path in FILES if path.name not in ("__init__.py", "__main__.py")]
    count = Counter(str(path.parent.relative_to(ROOT)) for path in modules)
    assert not {folder: n for folder, n in count.items() if n > MAX_MODULES}


def test_files_have_one_subject() -> None:
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in python_files()}
    long = {str(path): n for path, n in lines.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines; does each still have one subject? {long}"


def test_libraries_take_typed_arguments() -> None:
    """Only command files, and the modules that build and run them, know argparse's Namespace."""
    found = []
    for path in FILES:
        if path.name == "command.py" or is_command(path):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                annotations = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
                if any("Namespace" in ast.unparse(annotation) for annotation in annotations):
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not found


def test_modules_have_docstrings() -> None:
    sources = {path.relative_to(ROOT): path.read_text() for path in python_files()}
    silent = [str(path) for path, source in sources.items() if source and not ast.get_docstring(ast.parse(source))]
    assert not silent, f"no module docstring: {silent}"


def test_no_paths_of_one_machine() -> None:
    patterns = [option for text in FOREIGN_PATHS for option in ("-e", text)]
    assert not git("grep", "-nIF", *patterns, "--", ".", ":!tests/test_layout.py")


def test_safetensors_numpy_writes_nothing_of_ours():
    """Its writer stores a transposed or Fortran-ordered array in the order of memory under the array's shape.

    Such a file loads everywhere with permuted values (findings/safetensors_transposed.sh). Our files are written from
    contiguous tensors by vlv.checkpoints.tensor_files and safetensors.torch, which refuses others.
    """
    folders = {*PACKAGES, "benchmarks", "optimum", "scripts"}
    files = [path for path in python_files() if path.relative_to(ROOT).parts[0] in folders]
    assert len(files) > 100
    for path in files:
        lines = [line for line, name in imported(tree_of(path)) if name.startswith("safetensors.numpy")]
        assert not lines, f"{path.relative_to(ROOT)}:{lines} imports safetensors.numpy: write through safetensors.torch"
