"""Describe a checkpoint folder: python -m vlv.checkpoint DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import Parser, UserError


def main() -> None:
    parser = Parser(
        prog="python -m vlv.checkpoint",
        description="Describe a checkpoint folder: what it can do; sizes, dtypes and hashes of its parts.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with vlv.json")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    try:
        described = Checkpoint.open(args.folder).describe()
    except (UserError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if args.json:
        print(json.dumps(described, indent=2))
        return
    print(f"{described['folder']}: hash {described['hash']}, can {', '.join(described['can']) or 'only encode'}")
    for files in described["parts"].values():
        for file in files:
            parameters = ", ".join(f"{n / 1e6:,.2f} M {dtype}" for dtype, n in file["parameters"].items())
            print(f"  {file['file']:<40} {file['bytes'] / 1e6:>10,.1f} MB  {parameters}  sha256 {file['sha256'][:12]}")


if __name__ == "__main__":
    main()
