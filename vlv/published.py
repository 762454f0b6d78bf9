"""Convert published VLV weights to a checkpoint folder, and back.

SRC is a state dict (model.pt), DeepSpeed's consolidated file, safetensors, sharded or not, a folder
with one of these, or a hub id; of stage 1 or 2, of any width and dtype. Configurations and tokenizers
are searched beside it. No code in a file is executed, and the model need not fit in memory.

Tensors that the encoder does not use go to published.safetensors, from which --to-published restores every
byte. That file may be deleted if the checkpoint is never converted back.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, debug_argument, positive, run_command
from vlv.model.config import PRESETS

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """Return the parser of the command line."""
    p = Parser(prog="python -m vlv.published", description=__doc__, parents=[debug_argument()])
    p.add_argument("source", metavar="SRC", nargs="?", help="published weights: file, folder or hub id")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="folder or file to write; it appears when it is complete",
    )
    p.add_argument("--to-published", action="store_true", help="SRC is a converted folder: write it back")
    p.add_argument(
        "--random-weights",
        metavar="PRESET",
        choices=sorted(PRESETS),
        help=f"write random weights of these sizes, without SRC: {', '.join(sorted(PRESETS))}",
    )
    for name, model in {"florence": "Florence-2", "clip": "SD or its text encoder", "llm": "Qwen2.5"}.items():
        p.add_argument(f"--{name}", metavar="DIR", help=f"folder or hub id of {model} (default: found beside SRC)")
    p.add_argument("--t2i", type=Path, metavar="DIR", help="Stable Diffusion folder to link, for reconstruction")
    p.add_argument("--dtype", choices=DTYPES, help="convert to this dtype (default: keep; random: bfloat16)")
    p.add_argument("--image-size", type=positive, default=384, help="side of the crop in pixels (default: 384)")
    p.add_argument("--force", action="store_true", help="replace what is at --out")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_work, parser().parse_args(argv), interrupted="stopped; nothing was written to --out")


def _work(args: argparse.Namespace) -> None:
    if (args.source is None) == (args.random_weights is None):
        raise Misuse("give either SRC or --random-weights PRESET")
    import torch

    from vlv.checkpoints.published import fetch
    from vlv.checkpoints.published_read import convert
    from vlv.checkpoints.published_write import to_published
    from vlv.checkpoints.random_weights import write

    if args.to_published:
        print(json.dumps({"published": str(to_published(Path(args.source), args.out, args.force))}, indent=2))
        return
    if args.random_weights:
        checkpoint = write(args.random_weights, args.out, args.dtype or "bfloat16", args.force)
    else:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        companions = (args.florence, args.clip, args.llm, args.t2i)
        checkpoint = convert(fetch(args.source), args.out, *companions, dtype, args.image_size, args.force)
    print(json.dumps({"checkpoint": str(checkpoint.folder), "can": checkpoint.can}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
