"""Arguments that the captioning commands share, and the options that they become. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.components import GGUF_TYPES, RUNTIMES, TORCH_PRECISIONS
from serve import ENGINES, LLM_DTYPES, PLACEMENTS
from vlv.checkpoints.names import missing_reason
from vlv.common.command import Misuse, Parser, positive
from vlv.data.decoding.crop import CROPS

if TYPE_CHECKING:
    from serve.core.model import Model

LANGUAGE_MODEL, ENCODER, IMAGES = "language model", "encoder", "images"  # groups of arguments
MAX_WORKERS = 1024  # decode processes


def model_arguments(in_flight: int | None = None) -> Parser:
    """Return a parent parser for commands that read a checkpoint and send captions to a language model."""
    p = Parser(add_help=False)
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id (owner/model)")
    llm = p.add_argument_group(LANGUAGE_MODEL)
    llm.add_argument(
        "--max-tokens", type=positive, metavar="N", help="longest caption in tokens (default: 300, or what fits)"
    )
    default = in_flight or "by the GPU's memory, up to 512; 256 on a CPU"
    llm.add_argument(
        "--in-flight",
        type=positive,
        default=in_flight,
        metavar="N",
        help=f"captions decoded together (default: {default})",
    )
    return p


def engine_arguments() -> Parser:
    """Return a parent parser for commands that run the encoder and choose what runs the language model."""
    p = Parser(add_help=False)
    llm = p.add_argument_group(LANGUAGE_MODEL)
    llm.add_argument("--engine", choices=ENGINES, help="what runs the model (default: vllm, or remote with --llm-url)")
    llm.add_argument("--llm-url", metavar="URL", help="the server that runs the model: vLLM or serve.gateway")
    llm.add_argument("--lora", type=Path, metavar="DIR", help="with --engine vllm: PEFT adapter for the model")
    llm.add_argument(
        "--tensor-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="with --engine vllm: GPUs that share the model (default: 1)",
    )
    llm.add_argument(
        "--llm-dtype",
        choices=LLM_DTYPES,
        default="auto",
        help="with --engine vllm: data type of the weights (default: auto, bfloat16 on a GPU and float32 on a CPU)",
    )
    llm.add_argument(
        "--llm-quantization", choices=("fp8",), help="with --engine vllm, on a GPU: quantise the weights while loading"
    )
    llm.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="with --engine vllm: data type of the key-value cache (default: auto, that of the weights)",
    )
    llm.add_argument(
        "--gguf", type=Path, metavar="FILE", help="with --engine llamacpp: the model as a file that export.gguf wrote"
    )
    llm.add_argument(
        "--gguf-type",
        choices=GGUF_TYPES,
        default="f16",
        help="with --engine llamacpp, without --gguf: type to which the model is converted once (default: f16)",
    )
    llm.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps compiled kernels and graphs for the next start (default: the user's caches)",
    )
    encoder = p.add_argument_group(ENCODER)
    encoder.add_argument(
        "--encoder",
        choices=RUNTIMES,
        default="torch",
        help="what runs the encoder: PyTorch (default), or a runtime of the export in --artifacts",
    )
    encoder.add_argument("--artifacts", type=Path, metavar="DIR", help="folder of the export (export.onnx, export.trt)")
    encoder.add_argument(
        "--precision",
        choices=TORCH_PRECISIONS,
        help="precision of the encoder in PyTorch (default: bf16 on a GPU, else fp32)",
    )
    encoder.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in PyTorch on a GPU, run the encoder from CUDA graphs (default); --no-cuda-graphs saves memory",
    )
    encoder.add_argument(
        "--prompt-batch",
        type=positive,
        default=32,
        metavar="N",
        help="images that the encoder takes together (default: 32)",
    )
    images = p.add_argument_group(IMAGES)
    images.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="what the model sees: the centre square (default, published), all of the image on a square of grey, "
        "squashed, or in overlapping squares with a caption each (docs/images.md)",
    )
    images.add_argument(
        "--ignore-icc", action="store_true", help="do not convert colours to sRGB by the image's profile, as published"
    )
    images.add_argument(
        "--fast-jpeg",
        action="store_true",
        help="decode large JPEG files at 1/2, 1/4 or 1/8 of their size: less work for the CPU, slightly other pixels",
    )
    images.add_argument("--workers", type=_workers, metavar="N", help="decode processes (default: cores less one)")
    return p


def _workers(text: str) -> int:
    if (count := positive(text)) > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_WORKERS} processes, got {text!r}")
    return count


def placement_arguments() -> Parser:
    """Return a parent parser for commands that run encoder and language model in one service."""
    p = Parser(add_help=False)
    p.add_argument_group(ENCODER).add_argument(
        "--encoder-placement",
        choices=PLACEMENTS,
        default="process",
        help="where the encoder runs beside vLLM: in its own process, with embeddings as prompts (default) or as "
        "multimodal input; inline in one process with vLLM; or inside vLLM's engine",
    )
    return p


def require_checkpoint(ckpt: str | None) -> None:
    """Raise Misuse if --ckpt is missing or names nothing: before anything heavy is imported, which takes seconds."""
    if not ckpt:
        raise Misuse("--ckpt is needed (--help shows the usage)")
    if reason := missing_reason(ckpt):
        raise Misuse(f"--ckpt: {reason}")


def open_model(args: argparse.Namespace) -> Model:
    """Return the Model that model_arguments and engine_arguments describe. Raises Misuse, CheckpointError."""
    require_checkpoint(args.ckpt)
    from serve.core.model import Model, ModelOptions

    names = [name for name in ModelOptions.__dataclass_fields__ if hasattr(args, name)]
    return Model.of(ModelOptions(**{name: getattr(args, name) for name in names}))
