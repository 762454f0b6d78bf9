"""Write a checkpoint as one of vLLM's own models: python -m serve.vllm_plugin DIR --out VLLM_DIR

Then: vllm serve VLLM_DIR. vLLM finds `register` through the entry point `vllm.general_plugins` of this package, which
must be installed where vLLM runs.

    llm = vllm.LLM("VLLM_DIR")
    llm.generate({"prompt": "", "multi_modal_data": {"image": PIL.Image.open("photo.jpg")}})
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, debug_argument, run_command, say, why


def register() -> None:
    """Register VLV with vLLM, which calls this in each of its processes, whatever model it is about to load."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from serve.vllm_model.config import ARCHITECTURE, CaptionerConfig

    AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # by name: vLLM imports the model only for a folder of ours
        ModelRegistry.register_model(ARCHITECTURE, f"serve.vllm_model.model:{ARCHITECTURE}")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m serve.vllm_plugin",
        description="Write a checkpoint as a folder for `vllm serve`.\n\n"
        "    python -m serve.vllm_plugin DIR --out VLLM_DIR",
        parents=[debug_argument()],
    )
    p.add_argument("ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, metavar="VLLM_DIR", required=True, help="folder to write")
    p.add_argument("--force", action="store_true", help="replace what is there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(_write, parser().parse_args(argv), interrupted="stopped")


def _write(args: argparse.Namespace) -> None:
    from serve.vllm_model.folder import serve_command, write
    from vlv.checkpoints.folder import CheckpointError
    from vlv.checkpoints.published import resolve

    try:
        checkpoint = resolve(args.ckpt)
    except CheckpointError as error:
        raise Misuse(str(error)) from error
    try:
        write(checkpoint, args.out, args.force)
    except OSError as error:
        raise Misuse(f"--out {args.out} cannot be written: {why(error)}") from error
    say(f"written: {serve_command(args.out)}")


if __name__ == "__main__":
    sys.exit(main())
