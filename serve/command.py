"""What the commands of this room share: their arguments, what these say, and how a command ends.

    def parser():
        p = Parser(prog="python -m serve.x", parents=[model_arguments(), engine_arguments()])
    def main(argv=None):
        return run(work, parser().parse_args(argv))     # work(args) -> exit code; errors become one sentence

Light: neither torch nor a model is imported for --help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.components import RUNTIMES
from serve import ENGINES
from vlv.common.command import Misuse, Parser, UserError, one_line, positive, say

if TYPE_CHECKING:
    from serve.engines.base import LLMEngine, LLMSpec
    from vlv.checkpoints.folder import Checkpoint


def model_arguments(in_flight: int = 256) -> Parser:
    """For whatever reads a checkpoint and sends captions to a language model."""
    p = Parser(add_help=False)
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest caption in tokens (default: 300, or what fits)")
    p.add_argument(
        "--in-flight", type=positive, default=in_flight, metavar="N", help=f"captions written together ({in_flight})"
    )
    return p


def engine_arguments() -> Parser:
    """For whatever runs the encoder and chooses what runs the language model."""
    p = Parser(add_help=False)
    p.add_argument("--engine", choices=ENGINES, help="what runs the language model (vllm; with --llm-url remote)")
    p.add_argument("--llm-url", metavar="URL", help="vLLM or serve.gateway that runs the language model elsewhere")
    p.add_argument("--lora", type=Path, metavar="DIR", help="PEFT adapter for the language model (vllm)")
    p.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share the LLM (vllm)")
    p.add_argument("--encoder", choices=RUNTIMES, default="torch", help="what runs the encoder: torch, or an export")
    p.add_argument("--artifacts", type=Path, metavar="DIR", help="folder of the exported encoder (export.onnx)")
    p.add_argument("--prompt-batch", type=positive, default=32, metavar="N", help="images per encoder batch (32)")
    p.add_argument("--workers", type=positive, metavar="N", help="decode processes (default: cores less one)")
    return p


def debug_argument(shows: str = "tracebacks") -> Parser:
    """For every command."""
    p = Parser(add_help=False)
    p.add_argument("--debug", action="store_true", help=shows)
    return p


class ListenError(UserError, RuntimeError):
    """The address cannot be listened at."""


@dataclass(frozen=True)
class Model:
    """What model_arguments and engine_arguments say, checked as far as that goes without loading anything."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    spec: LLMSpec
    max_tokens: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Model:
        """Raises Misuse where they fit neither each other nor what is on the disk; CheckpointError."""
        from export.manifest import ArtifactError, Manifest
        from serve.engines.base import LLMSpec
        from vlv.checkpoints.folder import CheckpointError
        from vlv.checkpoints.published import resolve

        try:
            checkpoint = resolve(args.ckpt)
        except CheckpointError as error:
            raise Misuse(f"--ckpt: {error}") from error
        if (args.encoder == "torch") != (args.artifacts is None):
            raise Misuse(f"--encoder {args.encoder} and --artifacts: an exported encoder needs both, torch neither")
        try:
            if args.artifacts:
                Manifest.open(args.artifacts)
        except ArtifactError as error:
            raise Misuse(f"--artifacts: {error}") from error
        spec = LLMSpec.of(checkpoint)
        try:
            max_tokens = spec.max_tokens(args.max_tokens)
        except ValueError as error:
            raise Misuse(f"--max-tokens: {error}") from error
        return cls(args, checkpoint, spec, max_tokens)

    def engine(self) -> LLMEngine:
        """A new engine, not started. Raises OptionError for an option that it does not take."""
        from serve.engines.base import Options, engine_class

        args = self.args
        kind = engine_class(args.engine or ("remote" if args.llm_url else "vllm"))
        options = Options(args.lora, args.tensor_parallel, args.llm_url)
        return kind(self.spec, self.max_tokens, args.in_flight, args.debug, options)


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """work(args) and its exit code; an error ends in one sentence on stderr, or in its traceback with --debug."""
    try:
        return work(args)
    except Exception as error:
        if args.debug:
            raise
        code, text = verdict(error)
        say(f"error: {text}")
        return code


def verdict(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for an exception."""
    from export.manifest import ArtifactError
    from serve.core.decode import DecodeError
    from serve.core.inputs import SourceError
    from serve.engines.base import EngineError, OptionError
    from serve.outputs.jsonl import SinkError
    from vlv.checkpoints.folder import CheckpointError

    if isinstance(error, Misuse | SourceError | OptionError):
        return 2, str(error)
    if isinstance(error, SinkError | CheckpointError | ArtifactError | EngineError | DecodeError | ListenError):
        return 1, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{error.name} is not installed (python -m serve.vllm_caption --doctor says how)"
    return 1, f"{one_line(error)} (unexpected: --debug shows where)"
