"""Convert published VLV weights to a checkpoint folder, and back.

SRC is a state dict (model.pt), DeepSpeed's consolidated file, safetensors, sharded or not, a folder
with one of these, or a hub id; of stage 1 or 2, of any width and dtype. Configurations and tokenizers
are looked for beside it. Nothing executable is unpickled, and a whole model is never in memory.

What the encoder has no use for goes to published.safetensors, from which --to-published restores every
byte; whoever never goes back may delete that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlv.checkpoints.published import fetch
from vlv.common.command import Parser, UserError
from vlv.model.config import PRESETS

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = Parser(prog="python -m vlv.published", description=__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", help="published weights: file, folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="what to write; appears whole or not at all")
    parser.add_argument("--to-published", action="store_true", help="SRC is a folder converted before: write it back")
    parser.add_argument("--random-weights", metavar="PRESET", choices=sorted(PRESETS), help="no SRC: make one up")
    for name, what in {"florence": "Florence-2", "clip": "SD or its text encoder", "llm": "Qwen2.5"}.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"folder or hub id of {what} (default: found beside SRC)")
    parser.add_argument("--t2i", type=Path, metavar="DIR", help="Stable Diffusion folder to link, to reconstruct with")
    parser.add_argument("--dtype", choices=DTYPES, help="convert to this dtype (default: keep; random: bfloat16)")
    parser.add_argument("--image-size", type=int, default=384, help="side of the crop in pixels (default: 384)")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    if (args.source is None) == (args.random_weights is None):
        parser.error("give either SRC or --random-weights PRESET")
    if args.image_size < 1:
        parser.error(f"--image-size {args.image_size}: expected at least one pixel")
    if args.to_published and args.random_weights:
        parser.error("--to-published needs SRC, a folder converted before")
    try:
        print(json.dumps(_run(args), indent=2))
    except KeyboardInterrupt:
        print("stopped; nothing was written to --out", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run(args: argparse.Namespace) -> dict:
    """Do what the arguments say; tells what was written."""
    if args.to_published:
        from vlv.checkpoints.published_write import to_published

        return {"published": str(to_published(Path(args.source), args.out, args.force))}
    if args.random_weights:
        from vlv.checkpoints.random_weights import write

        made = write(args.random_weights, args.out, args.dtype or "bfloat16", args.force)
    else:
        import torch

        from vlv.checkpoints.published_read import convert

        dtype = getattr(torch, args.dtype) if args.dtype else None
        companions = (args.florence, args.clip, args.llm, args.t2i)
        made = convert(fetch(args.source), args.out, *companions, dtype, args.image_size, args.force)
    return {"checkpoint": str(made.folder), "can": made.can}


if __name__ == "__main__":
    main()
