"""An OpenAI-compatible captioning server: python -m serve.server --ckpt DIR --port 8000

/v1/chat/completions, /v1/captions, /v1/embeddings, /v1/models, /health, /ready, /metrics, and a page at /.
docs/serving.md describes them. It answers from the first second; captions come once /ready says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.command import engine_arguments, model_arguments, open_model
from vlv.common.command import Misuse, Parser, UserError, debug_argument, positive, run_command, say

if TYPE_CHECKING:
    from serve.http.routes import Routes


class ListenError(UserError, RuntimeError):
    """Raised where the address cannot be listened at."""


EXIT_CODES = """\
exit codes: 0 stopped by SIGTERM or Ctrl-C, with every request answered; 1 the server cannot run; 2 wrong arguments.
"""


def parser() -> argparse.ArgumentParser:
    """The command line. Light: neither torch nor the server is imported for --help."""
    p = Parser(
        prog="python -m serve.server",
        description="Serve captions of a VLV checkpoint over HTTP, as OpenAI's API.",
        epilog=EXIT_CODES,
        parents=[serving_arguments(), debug_argument("tracebacks, and the engine's log on stderr")],
    )
    p.add_argument("--new-key", metavar="NAME", help="make a key, add its hash to --keys, print it, and stop")
    p.add_argument(
        "--per-minute", type=positive, default=6000, metavar="N", help="of --new-key: images a minute (6000)"
    )
    p.add_argument("--concurrent", type=positive, default=256, metavar="N", help="of --new-key: images at a time (256)")
    return p


def listening_arguments() -> Parser:
    """For whatever listens at a port: where, whom it lets in, and how long it waits."""
    p = Parser(add_help=False)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    p.add_argument("--port", type=_port, default=8000, help="port to listen at (8000)")
    p.add_argument("--keys", type=Path, metavar="FILE", help="hashes of the API keys that are let in (see --new-key)")
    p.add_argument("--no-auth", action="store_true", help="listen beyond this machine without keys")
    p.add_argument("--deadline", type=positive, default=60, metavar="S", help="seconds for a whole request (60)")
    p.add_argument("--drain", type=positive, default=60, metavar="S", help="seconds to finish at SIGTERM (60)")
    return p


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 1 to 65535")


def serving_arguments() -> Parser:
    """For whatever answers requests with captions: the models, where it listens, and what a request may cost."""
    p = Parser(add_help=False, parents=[model_arguments(), engine_arguments(), listening_arguments()])
    p.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    p.add_argument("--queue", type=positive, default=128, metavar="N", help="images that may wait for their turn (128)")
    p.add_argument(
        "--image-host", action="append", default=[], metavar="HOST",
        help="fetch http(s) images from this host (repeatable; *.example.org, host:port); none by default",
    )  # fmt: skip
    p.add_argument("--body-seconds", type=positive, default=20, metavar="S", help="for a request to arrive (20)")
    p.add_argument("--max-body", type=positive, default=64, metavar="MIB", help="largest request (64)")
    p.add_argument("--max-bodies", type=positive, default=512, metavar="MIB", help="of all requests together (512)")
    p.add_argument("--max-image", type=positive, default=20, metavar="MIB", help="largest image file fetched (20)")
    p.add_argument("--max-images", type=positive, default=64, metavar="N", help="images in one request (64)")
    p.add_argument("--max-pixels", type=positive, default=50_000_000, metavar="N", help="of an image (50 million)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    return run_command(_new_key if args.new_key else in_loop(_serve), args)


def in_loop(work: Callable[[argparse.Namespace], Coroutine[Any, Any, int]]) -> Callable[[argparse.Namespace], int]:
    """A coroutine function as `run_command` takes it, on uvloop: asyncio's own loop costs more for each connection."""

    def running(args: argparse.Namespace) -> int:
        import uvloop

        return uvloop.run(work(args))

    return running


def _new_key(args: argparse.Namespace) -> int:
    from serve.http.auth import Keys, KeysError

    if not args.keys:
        raise Misuse("--new-key needs --keys FILE, where the key's hash is added")
    try:
        key = Keys.add(args.keys, args.new_key, per_minute=args.per_minute, concurrent=args.concurrent)
    except KeysError as error:
        raise Misuse(str(error)) from error
    print(key)
    say("the key is shown only now; a running server reads --keys when it starts again")
    return 0


async def _serve(args: argparse.Namespace) -> int:
    async with opened(args) as routes:
        return await listen(routes.app(), args, routes, routes.service.failure, args.body_seconds)


@contextlib.asynccontextmanager
async def opened(args: argparse.Namespace) -> AsyncIterator[Routes]:
    """The routes around a service that loads, as the arguments say; closed at the end. Raises Misuse."""
    from serve.core.service import ServiceConfig
    from serve.http.app import Bounds
    from serve.http.auth import Admission
    from serve.http.fetch import Fetcher
    from serve.http.routes import Routes
    from serve.http.service import Service

    keys = read_keys(args)
    model = open_model(args)
    config = ServiceConfig(args.prompt_batch, args.workers, args.max_pixels, args.encoder, args.artifacts)
    service = Service(model.checkpoint, model.engine, config)
    fetcher = Fetcher(tuple(args.image_host), args.max_image << 20)
    bounds = Bounds(args.deadline, args.body_seconds, args.max_body << 20, args.max_images)
    name = args.model_name or model.checkpoint.folder.resolve().name
    admission = Admission(args.in_flight + args.queue, args.max_bodies << 20)
    try:
        await service.start()
        yield Routes(service, name, keys, admission, fetcher, bounds)
    finally:
        await service.close()
        await fetcher.close()


async def listen(app, args: argparse.Namespace, routes, failure: asyncio.Future, header_seconds: float) -> int:
    """Serve until a signal or a failure, as listening_arguments say; returns the exit code.

    A signal refuses what is new and answers what has begun.
    """
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Protocol(HttpToolsProtocol):
        """A connection that must send the head of each request in time."""

        slow: asyncio.TimerHandle | None = None  # while a head is awaited

        def connection_made(self, transport):
            super().connection_made(transport)
            self.slow = self.loop.call_later(header_seconds, transport.close)

        def data_received(self, data):
            if not self.slow and (not self.cycle or self.cycle.response_complete):  # the next request on it
                self.slow = self.loop.call_later(header_seconds, self.transport.close)
            super().data_received(data)

        def on_headers_complete(self):
            if self.slow:
                self.slow.cancel()
                self.slow = None
            super().on_headers_complete()

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers: ours decide."""

        @contextlib.contextmanager
        def capture_signals(self):
            yield

    config = uvicorn.Config(
        app, args.host, args.port, http=Protocol, lifespan="off", log_level="warning", access_log=False, backlog=512,
        timeout_keep_alive=30, timeout_graceful_shutdown=args.drain, server_header=False, limit_concurrency=4096,
    )  # fmt: skip
    server, loop = Server(config), asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if routes.draining:
            server.force_exit = True
        say(f"{number.name}: no new requests; those that run are finished (at most {args.drain} s)")
        routes.draining = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    failure.add_done_callback(lambda _: setattr(server, "should_exit", True))
    say(f"listening at http://{args.host}:{args.port} (loading the models: /ready tells when they are there)")
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen; its log has said why
        place = f"{args.host}:{args.port}"
        raise ListenError(f"cannot listen at {place}: another server has the port, or it is not allowed") from error
    if failure.done():
        failure.result()
    return 0


def read_keys(args: argparse.Namespace):
    """The keys of --keys; without, only this machine is let in. Raises Misuse."""
    from serve.http.auth import Keys, KeysError

    if not (args.keys or args.no_auth or loopback(args.host)):
        raise Misuse(f"--host {args.host} lets others in: give --keys FILE (make one with --new-key), or --no-auth")
    try:
        return Keys.load(args.keys) if args.keys else Keys()
    except KeysError as error:
        raise Misuse(str(error)) from error


def loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
