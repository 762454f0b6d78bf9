"""VLV as a model of vLLM's own: python -m serve.vllm_plugin DIR --out VLLM_DIR, then: vllm serve VLLM_DIR

The folder holds the checkpoint's weights (as hard links where the file system has them) and what vLLM wants beside
them: config.json, the tokenizer, a chat template, and defaults for greedy captions. vLLM finds `register` through
the entry point `vllm.general_plugins` of this package, which has to be installed where vLLM runs.

    llm = vllm.LLM("VLLM_DIR")
    llm.generate({"prompt": "", "multi_modal_data": {"image": PIL.Image.open("photo.jpg")}})
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from vlv.common.command import Misuse, Parser, debug_argument, run_command, say, why

# a chat's text is not read; what every chat becomes is the picture in it
CHAT_TEMPLATE = "{# VLV reads the picture alone, and no text. #}"


def register() -> None:
    """Make VLV known to vLLM; it calls this in each of its processes, whatever model it is about to load."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from serve.vllm_model.config import ARCHITECTURE, CaptionerConfig

    AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # by name: vLLM imports it only for a folder of ours
        ModelRegistry.register_model(ARCHITECTURE, f"serve.vllm_model.model:{ARCHITECTURE}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m serve.vllm_plugin",
        description="Write a checkpoint as a folder for `vllm serve`.",
        parents=[debug_argument()],
    )
    p.add_argument("ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--out", type=Path, metavar="VLLM_DIR", required=True, help="folder to write")
    p.add_argument("--force", action="store_true", help="replace what is there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_write, parser().parse_args(argv))


def _write(args: argparse.Namespace) -> int:
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
    say(f"written: vllm serve {shlex.quote(str(args.out))}")
    return 0


def write(checkpoint, out: Path, force: bool = False) -> None:
    """Write the folder of a checkpoint. Raises CheckpointError."""
    from serve.engines.base import LLMSpec, load_tokenizer
    from serve.vllm_model.config import ARCHITECTURE, CaptionerConfig
    from vlv.common.files import atomic_folder, link_tree, write_json

    spec = LLMSpec.of(checkpoint)
    tokenizer = load_tokenizer(checkpoint.llm)
    tokenizer.chat_template = CHAT_TEMPLATE
    llm = json.loads((checkpoint.llm / "config.json").read_text())
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": CaptionerConfig.model_type,
        "dtype": "bfloat16",  # as our own commands run it on a GPU; on a CPU they do in float32
        "encoder": checkpoint.config.to_dict(),
        "text_config": llm,
    }
    if "quantization_config" in llm:
        config["quantization_config"] = llm["quantization_config"]
    with atomic_folder(out, _bytes_to_copy(checkpoint, out), force) as made:
        for file in (checkpoint.encoder_file, checkpoint.folder / "vlv.json"):
            _link(file, made / file.name)
        link_tree(checkpoint.llm, made / "llm")
        tokenizer.save_pretrained(made)
        write_json(made / "config.json", config)
        write_json(made / "generation_config.json", {"temperature": 0.0, "max_new_tokens": spec.max_tokens(None)})


def _bytes_to_copy(checkpoint, out: Path) -> int:
    """What the links cannot save: everything, where `out` is on another file system."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.parent.stat().st_dev == checkpoint.encoder_file.stat().st_dev:
        return 0
    return sum(file.stat().st_size for file in (checkpoint.encoder_file, *checkpoint.llm.iterdir()))


def _link(file: Path, copy: Path) -> None:
    try:
        os.link(file.resolve(), copy)
    except OSError:
        shutil.copyfile(file, copy)


if __name__ == "__main__":
    sys.exit(main())
