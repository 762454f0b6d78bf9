"""Measure everything about the fused kernels that needs a GPU, in one call.

    python -m benchmarks.gpu.kernels                  # checks, times; writes benchmarks/gpu/kernels.json
    python -m benchmarks.gpu.kernels --tune           # first measures every configuration into kernels/tuned.json
    python -m benchmarks.gpu.kernels --budget 300     # the same in 300 s, in the order of worth, and tunes
    python -m benchmarks.gpu.kernels --dry-run        # the same code at toy sizes in Triton's interpreter, on a CPU

Order: correctness of every operation; the encoder eager; the designs of window attention, of the depthwise convolution
and of the MLP's GELU at each shape (--tune, --budget); the encoder eager again, in CUDA graphs, in 8-bit floats (eager
and in graphs) and at other batches; profiles; transformers' encoder; the encoder compiled, and transformers' compiled;
other configurations; a UNet step; every operation against its rivals. The file is written after each figure, so a run
that is cut loses little.

Every result is first compared with PyTorch's float32 on the same inputs: the RMS error may be at most twice that of the
plain operations in the same dtype, or, in 8-bit floats, what their rounding explains. What is wrong is not timed.
Rivals: eager PyTorch (its attention is SDPA with its best backend) and torch.compile. Each figure stands beside its
target and its ceiling: the bytes or operations that it cannot do without, at the bandwidth of a copy and the speed of a
large matrix product on this GPU. Exit code 1 where there is no GPU, or where a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from vlv.common.command import Parser, positive, run_command, say

OUT = Path("benchmarks/gpu/kernels.json")


def parser() -> Parser:
    """Return the command line."""
    p = Parser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    p.add_argument("--dry-run", action="store_true", help="toy sizes in the interpreter, on the CPU; no figures")
    p.add_argument("--budget", type=positive, metavar="SECONDS", help="stop in time; implies --tune (no limit)")
    p.add_argument("--tune", action="store_true", help="measure configurations for this GPU first")
    p.add_argument("--batch", type=positive, default=32, help="images (32)")
    p.add_argument("--repeats", type=positive, default=30, help="timed calls of each (30)")
    p.add_argument("--only", default="", help="only what has this word in its name")
    p.add_argument("--out", type=Path, default=OUT, help=f"the figures ({OUT})")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(_run, parser().parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    if not args.dry_run and not torch.cuda.is_available():
        say("error: no CUDA device here; --dry-run checks this script on a CPU")
        return 1
    if args.dry_run:
        os.environ["VLV_KERNELS"] = "interpret"  # before the kernels are imported
    from benchmarks.gpu.kernel_steps import Contest

    contest = Contest(
        device="cpu" if args.dry_run else "cuda",
        batch=2 if args.dry_run else args.batch,
        repeats=args.repeats,
        budget=float(args.budget or "inf"),
        tune=bool(args.tune or args.budget),
        only=args.only,
        out=args.out if not args.dry_run or args.out != OUT else None,
    )
    return 0 if contest.run() else 1


if __name__ == "__main__":
    sys.exit(main())
