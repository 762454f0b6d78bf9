"""Render held-out scenes as PNG files: python -m vlv.scenes"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from vlv.common.command import Parser, positive, say, why
from vlv.data.scenes import HELD_OUT, render, sample


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(prog="python -m vlv.scenes", description="Write held-out scenes as PNG files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=positive, default=512, help="how many (default: 512)")
    parser.add_argument("--first", type=int, default=0, help="the first one's number (default: 0)")
    args = parser.parse_args(argv)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for number in range(args.first, args.first + args.count):
            picture = Image.fromarray(render(sample(HELD_OUT + number)))
            picture.save(args.folder / f"scene-{number:05}.png")
    except OSError as error:
        say(f"error: {args.folder} cannot be written: {why(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
