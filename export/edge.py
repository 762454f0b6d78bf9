"""Write a folder that captions images without PyTorch or vLLM: python -m export.edge --ckpt DIR --out BUNDLE

The folder has the encoder for ONNX Runtime, which takes an image of any size, the language model for llama.cpp,
programs in Python and C++ that caption with them, and test vectors. It is moved into place when all of it is verified.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import arguments
from export.components import GGUF_TYPES
from vlv.common.command import positive, run_command, say

PRECISIONS = ("fp32", "fp16", "int8")


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    p = arguments.parser("edge", __doc__)
    p.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the encoder (default: fp32)")
    p.add_argument(
        "--llm-type", choices=GGUF_TYPES, default="f16", help="type of the language model's weights (default: f16)"
    )
    p.add_argument(
        "--web",
        type=Path,
        metavar="DIR",
        help="add web/, a page that encodes in the browser; DIR: the npm package onnxruntime-web, such as "
        "node_modules/onnxruntime-web",
    )
    p.add_argument(
        "--scenes",
        type=positive,
        default=256,
        metavar="N",
        help="held-out scenes to verify the language model on (default: 256)",
    )
    p.add_argument("--allow-drift", action="store_true", help="keep a model that fails its check")
    p.add_argument("--force", action="store_true", help="replace what is in BUNDLE")
    arguments.verification_arguments(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Write the bundle with parsed flags; return the exit code."""
    checkpoint = arguments.open_checkpoint(args.ckpt)  # first: it silences the libraries

    from export.edge_bundle.build import BundleConfig, build_bundle

    config = BundleConfig(
        ckpt=args.ckpt,
        out=args.out,
        precision=args.precision,
        llm_type=args.llm_type,
        verification_inputs=args.verification_inputs,
        images=tuple(args.images),
        captions=args.captions,
        scenes=args.scenes,
        allow_drift=args.allow_drift,
        force=args.force,
        web=args.web,
    )
    content = build_bundle(config, checkpoint)
    for name, entry in content["files"].items():
        print(f"{entry['bytes']:>12,}  {name}")
    say(f"{args.out}: verified; try it: python {args.out}/caption.py --check")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(run, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
