"""Give the evaluation commands their common arguments, and write their results."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlv.common.command import Parser, UserError
from vlv.common.files import atomic_write


class EvaluationError(UserError, ValueError):
    """Raised for inputs that cannot be evaluated."""


def evaluation_parser(name: str, doc: str | None) -> Parser:
    """Return the parser of `python -m vlv.evaluate NAME`, with -o and --debug."""
    p = Parser(prog=f"python -m vlv.evaluate {name}", description=doc)
    p.add_argument("-o", "--out", type=results_file, metavar="JSON", help="file of the results (also printed)")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def results_file(text: str) -> Path:
    """Parse the argument of -o: a new file, or one that such a command wrote, and not one that it would read."""
    path = Path(text)
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64).lower()
        if start and not start.startswith((b'{\n "kind"', b"<!doctype html")):
            raise argparse.ArgumentTypeError(f"{text} is there already, and holds no results: choose another name")
    return path


def named_path(text: str) -> tuple[str, Path]:
    """Parse an argument NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, such as ours=captions.jsonl")
    return name, Path(path)


def results_head(kind: str, argv: list[str] | None) -> dict:
    """Return the first entries of a file of results: what it is, and the command that made it."""
    words = sys.argv[1:] if argv is None else argv
    return {"kind": kind, "command": " ".join([f"python -m vlv.evaluate {kind}", *map(str, words)])}


def write_results(found: dict, out: Path | None, show: bool = True) -> None:
    """Print the results, and write them to `out`, atomically."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if show:
        print(text)
    if out:
        write_text(text + "\n", out)


def write_text(text: str, out: Path) -> None:
    """Write a file atomically, and the folder that it is in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write_text(text, encoding="utf-8")
