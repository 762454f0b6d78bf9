"""The reference pages of the documentation, made from the docstrings whenever the site is built (a hook of mkdocs.yml).

modules.md lists every file with its first sentence, api.md the public names with signatures and docstrings of the
modules in PUBLIC. Files are parsed, not imported: building the site needs none of the toolkit's packages. Pages of
docs/ that mkdocs.yml does not place are added to the end of its navigation.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "vlv", "export", "serve")
PUBLIC = (
    "vlv.model.config", "vlv.data.image", "vlv.model.encoder", "vlv.checkpoints.folder", "vlv.model.captioner",
    "vlv.diffusion.t2i", "vlv.checkpoints.published",
    "export.runtimes.base", "export.runtimes.factory", "export.manifest",
    "serve.engines.base", "serve.core.run", "serve.core.service",
    "serve.core.inputs",
    "serve.outputs.jsonl",
)  # fmt: skip
GENERATED = {"modules.md", "api.md"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.replace("|", r"\|").replace("<", "&lt;")


def modules() -> str:
    """modules.md: one table for each package."""
    lines = ["# Modules", ""]
    for package in PACKAGES:
        lines += [f"## {package}", "", "| file | what it is |", "|---|---|"]
        for path in sorted((ROOT / package).rglob("*.py")):
            about = ast.get_docstring(_tree(path)) or ""
            lines.append(f"| `{path.relative_to(ROOT)}` | {_first_sentence(about)} |")
        lines.append("")
    return "\n".join(lines)


def _members(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node):
            yield node


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{word} {node.name}({ast.unparse(node.args)}){result}"


def _fields(node: ast.ClassDef) -> list[str]:
    """A dataclass' fields as they are written, with the comments beside them."""
    if "dataclass" not in " ".join(ast.unparse(decorator) for decorator in node.decorator_list):
        return []
    return [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]


def _entry(node, level: int) -> list[str]:
    code = [_signature(node), *(f"    {field}" for field in (_fields(node) if isinstance(node, ast.ClassDef) else []))]
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    lines = ["#" * level + f" {node.name}", "", "```python", *code, "```", "", "```text", docstring, "```", ""]
    if isinstance(node, ast.ClassDef):
        for member in _members(node.body):
            lines += _entry(member, level + 1)
    return lines


def api() -> str:
    """api.md: the public names of PUBLIC."""
    lines = ["# API reference", "", "Of the modules that are meant to be built upon.", ""]
    for name in PUBLIC:
        tree = _tree(ROOT / (name.replace(".", "/") + ".py"))
        lines += [f"## {name}", "", "```text", inspect.cleandoc(ast.get_docstring(tree) or ""), "```", ""]
        for node in _members(tree.body):
            lines += _entry(node, 3)
    return "\n".join(lines)


def on_config(config):
    """Place what the navigation leaves out: another package's new page is never lost."""
    placed = str(config.nav)
    more = [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in placed and p.name not in GENERATED]
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files, config):
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, content in (("modules.md", modules()), ("api.md", api())):
        files.append(File.generated(config, name, content=content))
    return files
