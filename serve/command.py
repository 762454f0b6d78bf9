"""Arguments that the captioning commands share, and the options that they become. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.components import RUNTIMES
from serve import ENGINES, PLACEMENTS
from vlv.common.command import Parser, positive

if TYPE_CHECKING:
    from serve.core.model import Model


def model_arguments(in_flight: int | None = None) -> Parser:
    """Return a parent parser for commands that read a checkpoint and send captions to a language model."""
    p = Parser(add_help=False)
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest caption in tokens (default: 300, or what fits)")
    default = in_flight or "by the GPU's memory, up to 512; 256 on a CPU"
    p.add_argument(
        "--in-flight", type=positive, default=in_flight, metavar="N", help=f"captions decoded together ({default})"
    )
    return p


def engine_arguments() -> Parser:
    """Return a parent parser for commands that run the encoder and choose what runs the language model."""
    p = Parser(add_help=False)
    p.add_argument("--engine", choices=ENGINES, help="what runs the language model (vllm; with --llm-url remote)")
    p.add_argument("--llm-url", metavar="URL", help="vLLM or serve.gateway that runs the language model elsewhere")
    p.add_argument("--lora", type=Path, metavar="DIR", help="PEFT adapter for the language model (vllm)")
    p.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share the LLM (vllm)")
    p.add_argument("--llm-quantization", choices=("fp8",), help="quantise the language model while it is loaded (vllm)")
    p.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of its keys and values (vllm)")
    p.add_argument("--cache", type=Path, metavar="DIR", help="keep what is compiled here (default: the user's caches)")
    p.add_argument("--encoder", choices=RUNTIMES, default="torch", help="what runs the encoder: torch, or an export")
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="folder of the exported encoder (export.onnx)")
    p.add_argument("--prompt-batch", type=positive, default=32, metavar="N", help="images per encoder batch (32)")
    p.add_argument("--workers", type=positive, metavar="N", help="decode processes (default: cores less one)")
    p.add_argument("--ignore-icc", action="store_true", help="take colours as stored, as published, not as sRGB")
    return p


def placement_arguments() -> Parser:
    """Return a parent parser for commands that run encoder and language model in one service."""
    p = Parser(add_help=False)
    p.add_argument(
        "--encoder-placement",
        choices=PLACEMENTS,
        default="process",
        help="where the encoder runs beside vLLM: in its own process, with embeddings as prompts (default) or as "
        "multimodal input; inline in one process with vLLM; or inside vLLM's engine",
    )
    return p


def open_model(args: argparse.Namespace) -> Model:
    """Return the Model that model_arguments and engine_arguments describe. Raises Misuse, CheckpointError."""
    from serve.core.model import Model, ModelOptions

    names = [name for name in ModelOptions.__dataclass_fields__ if hasattr(args, name)]
    return Model.of(ModelOptions(**{name: getattr(args, name) for name in names}))
