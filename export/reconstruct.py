"""Reconstruct images with any runtime: python -m export.reconstruct IMAGES --ckpt DIR -o out --backend onnx

The flags, samplers, interpolation and mixing are those of vlv.reconstruct; an exported runtime computes.

    python -m export.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --backend onnx --artifacts artifacts
    python -m export.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --backend rtx --artifacts artifacts --interpolate 7
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.components import RUNTIMES
from vlv import reconstruct
from vlv.common.command import hush, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = reconstruct.parser("python -m export.reconstruct", __doc__)
    p.add_argument(
        "--backend", choices=RUNTIMES, default="onnx", help="runtime of encoder and reconstruction (default: onnx)"
    )
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="what an export wrote; torch needs none")
    args = reconstruct.parse(p, argv)
    if args.captions or args.t2i or args.device != p.get_default("device"):
        p.error("--captions, --t2i and --device are vlv.reconstruct's: a backend has its device and takes images")
    if (args.artifacts is None) != (args.backend == "torch"):
        p.error(f"--backend {args.backend} {'takes no' if args.artifacts else 'needs'} --artifacts")
    return run_command(_work, args)


def _work(args: argparse.Namespace) -> None:
    from export.runtimes.factory import open_runtime
    from vlv.checkpoints.published import resolve
    from vlv.diffusion.reconstruct_files import reconstruct_images

    hush()
    checkpoint, chosen = resolve(args.ckpt), reconstruct.sampling(args)
    grid = reconstruct_images(
        args.images,
        checkpoint.config.image_size,
        lambda: open_runtime(args.backend, args.artifacts, checkpoint),
        args.output,
        chosen,
        args.interpolate,
        args.mix,
    )
    print(grid)


if __name__ == "__main__":
    sys.exit(main())
