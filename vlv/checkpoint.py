"""Describe a checkpoint folder: python -m vlv.checkpoint DIR"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlv.common.command import Parser, debug_argument, run_command


def parser() -> Parser:
    """Return the parser of the command line."""
    p = Parser(
        prog="python -m vlv.checkpoint",
        description="Describe a checkpoint folder: what it can do; sizes, dtypes and hashes of its parts.",
        parents=[debug_argument()],
    )
    p.add_argument("folder", metavar="DIR", type=Path, help="folder with vlv.json")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_work, parser().parse_args(argv))


def _work(args: argparse.Namespace) -> None:
    from vlv.checkpoints.folder import Checkpoint

    described = Checkpoint.open(args.folder).describe()
    if args.json:
        print(json.dumps(described, indent=2))
        return
    print(f"{described['folder']}: hash {described['hash']}, can {', '.join(described['can']) or 'only encode'}")
    for files in described["parts"].values():
        for file in files:
            parameters = ", ".join(f"{n / 1e6:,.2f} M {dtype}" for dtype, n in file["parameters"].items())
            print(f"  {file['file']:<40} {file['bytes'] / 1e6:>10,.1f} MB  {parameters}  sha256 {file['sha256'][:12]}")


if __name__ == "__main__":
    sys.exit(main())
