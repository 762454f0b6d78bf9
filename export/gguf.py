"""Write a checkpoint's language model for llama.cpp, verified: python -m export.gguf --ckpt DIR --out ARTIFACTS

One GGUF file per type, quantized by llama.cpp's own code. Each is run on held-out scenes and compared with float32
transformers; one that drifts is refused. The figures are in ARTIFACTS/manifest.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import arguments
from export.components import GGUF_TYPES
from vlv.common.command import positive, run_command, say


def run(args: argparse.Namespace) -> int:
    """Export with parsed flags; return the exit code."""
    checkpoint = arguments.open_checkpoint(args.ckpt)

    from export.builders.gguf_artifacts import GGUFConfig, export_gguf
    from export.verification.report import gguf_table

    config = GGUFConfig(args.ckpt, args.out, tuple(args.types), args.scenes, args.allow_drift, args.force)
    artifacts, problems = export_gguf(config, checkpoint)
    print(gguf_table(artifacts))
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = arguments.parser("gguf", __doc__)
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, required=True, metavar="ARTIFACTS", help="folder of the artifacts")
    p.add_argument(
        "--types",
        nargs="+",
        choices=GGUF_TYPES,
        default=["f16"],
        metavar="TYPE",
        help=f"{', '.join(GGUF_TYPES)} (default: f16)",
    )
    p.add_argument(
        "--scenes", type=positive, default=256, metavar="N", help="held-out scenes to verify on (default: 256)"
    )
    p.add_argument("--allow-drift", action="store_true", help="keep a file that fails the check")
    p.add_argument("--force", action="store_true", help="write again what is up to date")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(run, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
