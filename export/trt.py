"""Build TensorRT-RTX or TensorRT engines: python -m export.trt --ckpt DIR --out ARTIFACTS --target sm89

Components that are not exported to ONNX in ARTIFACTS yet are exported and verified first. TensorRT-RTX builds without a
GPU, for the targets that it knows; TensorRT (--runtime trt) builds on the GPU that the engine is for. An engine is kept
as long as its graph, shapes, precision, target and builder stay the same. With --plugins, TensorRT runs our fused
kernels; such an engine computes batches of one size, the largest, and pads smaller ones. For a GPU in another machine,
such as a Jetson, --print-trtexec prints the commands that build the engines there.
"""

from __future__ import annotations

import argparse
import re
import sys

from export import arguments, onnx
from vlv.common.command import Misuse, run_command


def _target(text: str) -> str:
    if re.fullmatch(r"sm\d{2,3}", text):
        return text
    raise argparse.ArgumentTypeError(f"expected a compute capability such as sm89, got {text!r}")


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    p = arguments.parser("trt", __doc__)
    onnx.add_arguments(p)
    p.add_argument(
        "--target",
        type=_target,
        required=True,
        metavar="SM",
        help="compute capability of the GPU that runs the engine, such as sm89 (L4, L40S, RTX 4090)",
    )
    p.add_argument("--runtime", choices=("rtx", "trt"), default="rtx", help="TensorRT-RTX (default) or TensorRT")
    p.add_argument(
        "--plugins",
        choices=("auto", "on", "off"),
        default="auto",
        help="fused kernels as plugins of a TensorRT engine (default: auto, in half precision); TensorRT-RTX has none",
    )
    p.add_argument("--refittable", action="store_true", help="build engines whose weights --refit can replace")
    p.add_argument("--refit", action="store_true", help="replace the weights of the existing engine")
    p.add_argument(
        "--print-trtexec",
        action="store_true",
        help="build nothing: print the trtexec commands for the machine that has the GPU",
    )
    return p


def run(args: argparse.Namespace) -> int:
    """Build engines with parsed flags; return the exit code."""
    from export.builders import trtexec
    from export.builders.onnx import open_export
    from export.builders.tensorrt import EngineConfig, build_engines

    config = onnx.config_of(args)
    engine = EngineConfig(args.target, args.runtime, args.plugins, args.refittable, args.refit)
    if args.print_trtexec or (engine.runtime == "rtx" and engine.target in trtexec.JETSON):
        engine.require_precision(config.precision)
        for line in trtexec.commands(config, engine, arguments.open_checkpoint(args.ckpt)):
            print(line)
        if args.print_trtexec:
            return 0
        raise Misuse(
            f"--target {engine.target}: TensorRT-RTX does not build for {trtexec.JETSON[engine.target]}: export to "
            "ONNX here, copy the files to the device, and run the trtexec commands above there"
        )
    engine.require_buildable(config)
    with open_export(config, arguments.open_checkpoint(args.ckpt)) as export:
        return onnx.print_report(build_engines(export, engine))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(run, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
