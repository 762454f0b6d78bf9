"""Export a checkpoint to ONNX, verified: python -m export.onnx --ckpt DIR --out ARTIFACTS

Each component becomes one graph, which ONNX Runtime runs on images and noise; the results are compared with float32
PyTorch, and a graph that drifts is refused. Components that are up to date are kept, so an interrupted export continues
where it ended. The figures are in ARTIFACTS/manifest.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export import arguments
from export.components import COMPONENTS, PRECISIONS
from vlv.common.command import positive, run_command, say

if TYPE_CHECKING:
    from export.builders.onnx import ExportConfig, Report


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the flags of this command, which `export.trt` has too."""
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, required=True, metavar="ARTIFACTS", help="folder of the artifacts")
    p.add_argument(
        "--components",
        nargs="+",
        choices=list(COMPONENTS),
        default=[],
        metavar="NAME",
        help=f"what to export: {', '.join(COMPONENTS)} (default: all that the checkpoint has)",
    )
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision inside the graph (default: fp32)")
    p.add_argument(
        "--max-batch",
        type=positive,
        default=32,
        metavar="N",
        help="largest batch of the encoder, in images (default: 32)",
    )
    drawn = ("--max-images", "--max-pictures")  # the second is the older name
    p.add_argument(*drawn, type=positive, default=8, metavar="N", help="images reconstructed together (default: 8)")
    p.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="photos to measure ranges of activations on, others than --images (drawn scenes)",
    )
    p.add_argument("--allow-drift", action="store_true", help="keep an artifact that fails the check")
    p.add_argument("--force", action="store_true", help="export again what is up to date")
    arguments.verification_arguments(p)


def config_of(args: argparse.Namespace) -> ExportConfig:
    """Build the library's configuration from parsed flags. Raises Misuse."""
    from export.builders.onnx import ExportConfig

    return ExportConfig(
        ckpt=args.ckpt,
        out=args.out,
        components=tuple(args.components),
        precision=args.precision,
        max_batch=args.max_batch,
        max_images=args.max_images,
        verification_inputs=args.verification_inputs,
        images=tuple(args.images),
        calibrate=tuple(args.calibrate),
        captions=args.captions,
        allow_drift=args.allow_drift,
        force=args.force,
    )


def print_report(report: Report) -> int:
    """Print the figures, and the problems to stderr; return the exit code."""
    from export.verification.report import table

    print(table(report.artifacts))
    for problem in report.problems:
        say(f"error: {problem}")
    return 1 if report.problems else 0


def run(args: argparse.Namespace) -> int:
    """Export with parsed flags; return the exit code."""
    from export.builders.onnx import export_onnx, open_export

    config = config_of(args)
    with open_export(config, arguments.open_checkpoint(args.ckpt)) as export:
        return print_report(export_onnx(export))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = arguments.parser("onnx", __doc__)
    add_arguments(p)
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
