"""One HTML page of the results of the other commands, with nothing outside it.

python -m vlv.evaluate report images.json judged.json vqa.json benchmarks/bottleneck.json -o report.html
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlv.common.command import Misuse, run_command
from vlv.evaluate.results import EvaluationError, evaluation_parser, write_text


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = evaluation_parser("report", __doc__)
    p.add_argument("results", nargs="+", type=Path, metavar="JSON", help="results of the other commands")
    return run_command(_report, p.parse_args(argv))


def _report(args: argparse.Namespace) -> int:
    if not args.out:
        raise Misuse("-o FILE.html is needed: the file of the page")

    from vlv.common.html import page
    from vlv.evaluate.page.sections import STYLE, section

    sections = []
    for file in args.results:
        try:
            sections.append(section(file.name, json.loads(file.read_text("utf-8-sig"))))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise EvaluationError(f"{file} is no result of these commands ({type(error).__name__}: {error})") from error
    write_text(page("VLV evaluation", "\n".join(sections), STYLE), args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
