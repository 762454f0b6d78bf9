"""Check graphs in seconds before engines are built from them for minutes: python -m export.lint FILE.onnx …

Finds unsupported operators, 64-bit integers in the data path, shapes outside the profile, operators that compute
something else than their PyTorch code, and too little memory for the build. Reads the graph, not the weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import arguments
from vlv.common.command import Misuse, run_command, say


def run(args: argparse.Namespace) -> int:
    """Check the files; return the exit code."""
    from export.verification.graph_lint import problems

    if missing := [file for file in args.files if not file.is_file()]:
        raise Misuse(f"no file {missing[0]}")
    found = [f"{file}: {problem}" for file in args.files for problem in problems(file, None, args.runtime)]
    for problem in found:
        say(f"error: {problem}")
    if not found:
        print(f"{len(args.files)} graphs without problems")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = arguments.parser("lint", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="ONNX graphs")
    p.add_argument(
        "--runtime",
        default="rtx",
        choices=("onnx", "rtx", "trt"),
        help="runtime that the graphs are for (default: rtx)",
    )
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
