"""Compare artifacts with float32 PyTorch: python -m export.verify --artifacts DIR --ckpt DIR [--runtime onnx]

The checks that end every export, on any runtime of this machine; prints a table of the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import arguments
from export.components import RUNTIMES
from vlv.common.command import run_command, say


def run(args: argparse.Namespace) -> int:
    """Verify the folder's artifacts; return the exit code."""
    from export.runtimes.factory import open_runtime
    from export.verification.inputs import VerificationInputs
    from export.verification.report import table
    from export.verification.verifier import Verifier

    checkpoint = arguments.open_checkpoint(args.ckpt)
    runtime = open_runtime(args.runtime, args.artifacts, checkpoint)
    inputs = VerificationInputs(checkpoint, args.verification_inputs, args.images)
    artifacts = Verifier(checkpoint, inputs, args.captions).check_all(runtime)
    print(table(artifacts))
    problems = [
        f"{artifact.name}: {problem}" for artifact in artifacts for problem in artifact.verification["problems"]
    ]
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = arguments.parser("verify", __doc__)
    p.add_argument("--artifacts", type=Path, required=True, metavar="DIR", help="the folder that an export wrote")
    p.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint that it was made from")
    p.add_argument("--runtime", default="onnx", choices=RUNTIMES[1:], help="runtime to check (default: onnx)")
    arguments.verification_arguments(p)
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
