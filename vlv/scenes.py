"""Render held-out scenes as PNG files: python -m vlv.scenes"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Parser, UserError, debug_argument, positive, run_command, why


def parser() -> Parser:
    """Return the parser of the command line."""
    p = Parser(
        prog="python -m vlv.scenes", description="Write held-out scenes as PNG files.", parents=[debug_argument()]
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--count", type=positive, default=512, help="scenes to write (default: 512)")
    p.add_argument("--first", type=int, default=0, help="number of the first scene (default: 0)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_work, parser().parse_args(argv))


def _work(args: argparse.Namespace) -> None:
    from vlv.data.scenes import write_scenes

    try:
        write_scenes(args.folder, args.first, args.count)
    except OSError as error:
        raise UserError(f"{args.folder} cannot be written: {why(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
