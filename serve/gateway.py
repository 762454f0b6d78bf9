"""Pass prompt embeddings to vLLM: python -m serve.gateway --ckpt DIR --llm-url http://127.0.0.1:8001

The data-centre side of captioning at the edge. Takes prompt embeddings as safetensors, checks shape, dtype and
finiteness, and passes them to a stock `vllm serve LLM --enable-prompt-embeds` on this machine. vLLM itself unpickles
what it is sent; it must never be reachable from outside.

    POST /v1/generate    body: safetensors with one tensor `embeds` [queries, width];
                         header X-VLV-Sampling: {"max_tokens": 300, "temperature": 0, "seed": 0, "stream": false}
"""

from __future__ import annotations

import argparse
import sys
import urllib.parse

from serve.command import model_arguments
from serve.server import EXIT_CODES, config_from, listening_arguments
from vlv.common.command import Misuse, Parser, debug_argument, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = Parser(
        prog="python -m serve.gateway",
        description="Take prompt embeddings from other machines, check them, and pass them to a vLLM here.\n\n"
        "    vllm serve DIR/llm --enable-prompt-embeds --host 127.0.0.1 --port 8001 --generation-config vllm\n"
        "    python -m serve.gateway --ckpt DIR --llm-url http://127.0.0.1:8001 --port 8002",
        epilog=EXIT_CODES,
        parents=[model_arguments(in_flight=512), listening_arguments(), debug_argument()],
    )
    p.add_argument("--llm-url", metavar="URL", help="vLLM on this machine, such as http://127.0.0.1:8001")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(_serve, parser().parse_args(argv), interrupted="stopped")


def _serve(args: argparse.Namespace) -> int:
    import uvloop

    from serve.engines.base import LLMSpec
    from serve.http.auth import is_loopback
    from serve.http.gateway import serve_gateway
    from serve.http.listener import ListenConfig
    from vlv.checkpoints.folder import Checkpoint, CheckpointError

    if not args.ckpt or not args.llm_url:
        raise Misuse("--ckpt and --llm-url are needed (--help shows the usage)")
    if not is_loopback(urllib.parse.urlsplit(args.llm_url).hostname or ""):
        raise Misuse(
            f"--llm-url {args.llm_url}: vLLM must be on this machine (127.0.0.1), it unpickles what it is sent"
        )
    try:
        spec = LLMSpec.of(Checkpoint.open(args.ckpt))
        max_tokens = spec.max_tokens(args.max_tokens)
    except (CheckpointError, ValueError) as error:
        raise Misuse(str(error)) from error
    config = config_from(args, ListenConfig)
    return uvloop.run(serve_gateway(spec, max_tokens, args.in_flight, args.llm_url, config))


if __name__ == "__main__":
    sys.exit(main())
