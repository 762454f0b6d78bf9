"""Pictures from pictures through any runtime: python -m export.reconstruct PICTURES --ckpt DIR -o out --backend onnx

vlv.reconstruct with an engine of this room behind it: the same flags, samplers, interpolation and mixing.

    python -m export.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --backend onnx --artifacts artifacts
    python -m export.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --backend rtx --artifacts artifacts --interpolate 7
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.components import RUNTIMES
from vlv import reconstruct


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = reconstruct.parser("python -m export.reconstruct", __doc__)
    p.add_argument("--backend", choices=RUNTIMES, default="onnx", help="what runs the encoder and the drawing (onnx)")
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="what an export wrote; torch needs none")
    args = reconstruct.arguments(p, argv)
    if args.captions or args.t2i or args.device != p.get_default("device"):
        p.error("--captions, --t2i and --device are vlv.reconstruct's: a backend has its device and draws from images")
    if (args.artifacts is None) != (args.backend == "torch"):
        p.error(f"--backend {args.backend} {'takes no' if args.artifacts else 'needs'} --artifacts")
    return reconstruct.run(args, _engine)


def _engine(args: argparse.Namespace, checkpoint):
    from export.runtimes.base import open_runtime

    return open_runtime(args.backend, args.artifacts, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
