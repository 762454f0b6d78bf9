"""What the evaluation commands have in common: how they end, what they print, where their results go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from vlv.common import command
from vlv.common.command import Misuse, say
from vlv.common.files import atomic_write

INSTALL = {
    "torchmetrics": "pip install --no-deps torchmetrics lightning-utilities",
    "pycocoevalcap": "pip install --no-deps pycocoevalcap",
    "openai": "pip install openai",
}  # --no-deps where the dependencies would bring another build of torch


class Parser(command.Parser):
    """The parser of `python -m vlv.evaluate COMMAND`."""

    def __init__(self, name: str, doc: str):
        super().__init__(prog=f"python -m vlv.evaluate {name}", description=doc)
        self.add_argument("-o", "--out", type=Path, metavar="JSON", help="file of the results (also printed)")
        self.add_argument("--debug", action="store_true", help="show tracebacks")


def named(text: str) -> tuple[str, Path]:
    """An argument NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, such as ours=captions.jsonl")
    return name, Path(path)


def run(parser: command.Parser, work: Callable[[argparse.Namespace], int], argv: list[str] | None) -> int:
    """Parse, work, and return the exit code: 2 for misuse, 1 for a failure, 130 after Ctrl-C."""
    args = parser.parse_args(argv)
    try:
        return work(args)
    except KeyboardInterrupt:
        say("stopped; what is done is kept, and the same command goes on from there")
        return 130
    except ModuleNotFoundError as error:
        if args.debug:
            raise
        package = (error.name or "").split(".")[0]
        say(f"error: {package} is not installed: {INSTALL.get(package, f'pip install {package}')}")
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        if args.debug:
            raise
        say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return 2 if isinstance(error, Misuse) else 1


def results(kind: str, argv: list[str] | None) -> dict:
    """The head of a file of results: what it is and the command that made it."""
    words = sys.argv[1:] if argv is None else argv
    return {"kind": kind, "command": " ".join([f"python -m vlv.evaluate {kind}", *map(str, words)])}


def write(found: dict, out: Path | None, show: bool = True) -> None:
    """Print the results, and write them to `out`."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if show:
        print(text)
    if out:
        write_text(text + "\n", out)


def write_text(text: str, out: Path) -> None:
    """Write a file whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write_text(text, encoding="utf-8")
