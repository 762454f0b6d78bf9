"""Serve captions over HTTP as OpenAI's API: python -m serve.server --ckpt DIR --port 8000

/v1/chat/completions, /v1/captions, /v1/embeddings, /v1/models, /health, /ready, /metrics, and a page at /.
docs/serving.md describes them. The server answers at once; it captions when /ready returns 200.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from serve.command import engine_arguments, model_arguments, placement_arguments, require_checkpoint
from vlv.common.command import Misuse, Parser, debug_argument, positive, run_command, say

EXIT_CODES = """\
exit codes: 0 stopped by SIGTERM or Ctrl-C, with every request answered; 1 the server cannot run; 2 wrong arguments.
"""
Config = TypeVar("Config")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser. Imports neither torch nor the server."""
    p = Parser(
        prog="python -m serve.server",
        description="Serve captions of a VLV checkpoint over HTTP, as OpenAI's API.\n\n"
        "    python -m serve.server --ckpt DIR --port 8000\n"
        "    python -m serve.server --keys keys.json --new-key alice        # prints a key\n"
        "    python -m serve.server --ckpt DIR --host 0.0.0.0 --keys keys.json",
        epilog=EXIT_CODES,
        parents=[
            serving_arguments(),
            placement_arguments(),
            debug_argument("tracebacks, and the engine's log on stderr"),
        ],
    )
    p.add_argument("--warm", action="store_true", help="load the models, fill the caches (--cache), and stop")
    p.add_argument(
        "--web",
        type=Path,
        metavar="DIR",
        help="offer on the page to encode in the browser, so that photos stay there; DIR: web/ of an edge bundle "
        "(export.edge --web)",
    )
    p.add_argument("--new-key", metavar="NAME", help="make a key, add its hash to --keys, print it, and stop")
    p.add_argument(
        "--per-minute", type=positive, default=6000, metavar="N", help="with --new-key: images a minute (default: 6000)"
    )
    p.add_argument(
        "--concurrent", type=positive, default=256, metavar="N", help="with --new-key: images at a time (default: 256)"
    )
    return p


def listening_arguments() -> Parser:
    """Return a parent parser for servers: where they listen, whom they let in, and how long they wait."""
    p = Parser(add_help=False)
    group = p.add_argument_group("address, access and time")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, help="port to listen at (default: 8000)")
    group.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="file with the hashes of the API keys that are let in; --new-key writes it",
    )
    group.add_argument("--no-auth", action="store_true", help="listen beyond this machine without keys")
    group.add_argument(
        "--deadline", type=positive, default=60, metavar="S", help="seconds for a whole request (default: 60)"
    )
    group.add_argument("--access-log", action="store_true", help="log every request, not only those that fail")
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin call the server, such as https://app.example.org, or '*': all "
        "(repeatable; default: none)",
    )
    group.add_argument(
        "--drain",
        type=positive,
        default=60,
        metavar="S",
        help="seconds that running requests get after SIGTERM (default: 60)",
    )
    return p


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")


def serving_arguments() -> Parser:
    """Return a parent parser for captioning servers: the models, where they listen, and what a request may cost."""
    p = Parser(add_help=False, parents=[model_arguments(), engine_arguments(), listening_arguments()])
    p.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    limits = p.add_argument_group("limits of requests")
    limits.add_argument(
        "--queue",
        type=positive,
        metavar="N",
        help="images that may wait for their turn (default: those that will be captioned within --deadline)",
    )
    limits.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch http(s) images from this host, such as '*.example.org' or host:8080 (repeatable; default: none)",
    )
    limits.add_argument(
        "--body-seconds", type=positive, default=20, metavar="S", help="seconds for a request to arrive (default: 20)"
    )
    limits.add_argument(
        "--max-body", type=positive, default=64, metavar="MIB", help="size of the largest request (default: 64)"
    )
    limits.add_argument(
        "--max-bodies", type=positive, default=512, metavar="MIB", help="size of all requests together (default: 512)"
    )
    limits.add_argument(
        "--max-image",
        type=positive,
        default=20,
        metavar="MIB",
        help="size of the largest image file that is fetched (default: 20)",
    )
    limits.add_argument(
        "--max-images", type=positive, default=64, metavar="N", help="images in one request (default: 64)"
    )
    limits.add_argument(
        "--max-pixels",
        type=positive,
        default=50_000_000,
        metavar="N",
        help="pixels of the largest image (default: 50 million)",
    )
    return p


def config_from(args: argparse.Namespace, kind: type[Config]) -> Config:
    """Return a dataclass of the given kind, whose fields have the names of the arguments."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)})


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    return run_command(_serve if args.new_key is None else _new_key, args, interrupted="stopped")


def _new_key(args: argparse.Namespace) -> int:
    from serve.http.auth import Keys, KeysError

    if not args.new_key:
        raise Misuse("--new-key needs a name, such as --new-key alice")
    if not args.keys:
        raise Misuse("--new-key needs --keys FILE, where the key's hash is added")
    try:
        key = Keys.add(args.keys, args.new_key, per_minute=args.per_minute, concurrent=args.concurrent)
    except KeysError as error:
        raise Misuse(str(error)) from error
    print(key)
    say("the key is shown only now; a running server reads --keys when it starts again")
    return 0


def _serve(args: argparse.Namespace) -> int:
    require_checkpoint(args.ckpt)
    import uvloop  # asyncio's own loop needs more time for each connection

    from serve.http.routes import ServerConfig, serve_captions, warm_up

    if args.encoder_placement == "engine":
        raise Misuse("--encoder-placement engine keeps the embeddings in vLLM, and the server has to return them")
    return uvloop.run((warm_up if args.warm else serve_captions)(config_from(args, ServerConfig)))


if __name__ == "__main__":
    sys.exit(main())
