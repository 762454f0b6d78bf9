"""House rules that a reader would notice: short files, docstrings, nothing of the machine it was written on."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 330
MACHINE = ["/work/", "index-url", "find-links"]


def git(*args: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr  # git grep: 1 is "nothing found"
    return run.stdout.splitlines()


def python_files() -> list[Path]:
    return [ROOT / name for name in git("ls-files", "*.py") if (ROOT / name).exists()]


def test_files_are_short() -> None:
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in python_files()}
    long = {str(path): n for path, n in lines.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines; does each still have one subject? {long}"


def test_modules_say_what_they_are() -> None:
    sources = {path.relative_to(ROOT): path.read_text() for path in python_files()}
    silent = [str(path) for path, source in sources.items() if source and not ast.get_docstring(ast.parse(source))]
    assert not silent, f"no module docstring: {silent}"


def test_nothing_of_one_machine() -> None:
    patterns = [option for text in MACHINE for option in ("-e", text)]
    assert not git("grep", "-nIF", *patterns, "--", ".", ":!tests/test_house.py")
