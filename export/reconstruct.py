"""Reconstruct images through any runtime: python -m export.reconstruct IMAGES --ckpt DIR -o out --backend onnx

The command vlv.reconstruct with a runtime of this package: the same flags, samplers, interpolation and mixing.

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
    """Run the command; return its exit code."""
    p = reconstruct.parser("python -m export.reconstruct", __doc__)
    p.add_argument("--backend", choices=RUNTIMES, default="onnx", help="runtime of all components (onnx)")
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="the folder that an export wrote; torch needs none")
    args = reconstruct.arguments(p, argv)
    if args.captions or args.t2i or args.device != p.get_default("device"):
        p.error(
            "--captions, --t2i and --device are vlv.reconstruct's: a backend has its own device, and starts from images"
        )
    if (args.artifacts is None) != (args.backend == "torch"):
        p.error(f"--backend {args.backend} {'takes no' if args.artifacts else 'needs'} --artifacts")
    return reconstruct.run(args, _open)


def _open(args: argparse.Namespace, checkpoint):
    from export.runtimes.factory import open_runtime

    return open_runtime(args.backend, args.artifacts, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
