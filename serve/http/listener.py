"""Listen for HTTP: uvicorn with a time limit for each request's head, and with a shutdown that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.http.app import CaptionApp
from vlv.common.command import UserError, say

WATCH = 0.2  # seconds between two checks whether the server is ready


class ListenError(UserError, RuntimeError):
    """Raised if the server cannot listen at its address."""


@dataclass(frozen=True)
class ListenConfig:
    """Where a server listens, whom it lets in, and how long it waits."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None  # file of key hashes
    no_auth: bool = False  # listen beyond this machine without keys
    deadline: float = 60  # seconds for a whole request
    drain: int = 60  # seconds to finish running requests after SIGTERM
    body_seconds: float = 20  # seconds for a request to arrive
    access_log: bool = False  # log every request, not only errors
    cors: tuple[str, ...] = ()  # origins whose pages may call this server; "*": all
    debug: bool = False


class Server(uvicorn.Server):
    """Run uvicorn without its signal handlers: `listen` installs its own."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class TimedProtocol(HttpToolsProtocol):
    """Close a connection that does not send the head of a request in time."""

    def __init__(self, *args, header_seconds: float, **options):
        super().__init__(*args, **options)
        self.header_seconds = header_seconds
        self.timer: asyncio.TimerHandle | None = None  # set while a head is awaited

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timer = self.loop.call_later(self.header_seconds, transport.close)

    def data_received(self, data):
        if not self.timer and (not self.cycle or self.cycle.response_complete):  # the connection's next request
            self.timer = self.loop.call_later(self.header_seconds, self.transport.close)
        super().data_received(data)

    def on_headers_complete(self):
        if self.timer:
            self.timer.cancel()
            self.timer = None
        super().on_headers_complete()


async def announce(app: CaptionApp, url: str, start: float) -> None:
    """Print one line when the server is ready: since when, where, with which settings; and again after a restart."""
    ready = False
    while True:
        if app.service.ready and not ready:
            say(f"ready after {time.monotonic() - start:.1f} s at {url}: {app.describe()}")
        ready = app.service.ready
        await asyncio.sleep(WATCH)


async def listen(app: ASGIApp, state: CaptionApp, config: ListenConfig, failure: asyncio.Future) -> int:
    """Serve `app` until a signal or until `failure` is set; return the exit code.

    A signal sets `state.draining`: new requests are refused, running ones are answered. Raises ListenError, and the
    exception of `failure`.
    """
    server = Server(
        uvicorn.Config(
            app,
            config.host,
            config.port,
            http=partial(TimedProtocol, header_seconds=config.body_seconds),  # pyright: ignore[reportArgumentType]
            lifespan="off",
            log_level="warning",
            access_log=False,
            backlog=512,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=config.drain,
            server_header=False,
            limit_concurrency=4096,
        )
    )
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if state.draining:
            server.force_exit = True
        say(f"{number.name}: no new requests; those that run are finished (at most {config.drain} s)")
        state.draining = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    failure.add_done_callback(lambda _: setattr(server, "should_exit", True))
    url = f"http://{config.host}:{config.port}"
    say(f"opening {url}; the models are loading, and /ready tells when they are there")
    announcing = asyncio.create_task(announce(state, url, time.monotonic()))
    try:
        await server.serve()
    except SystemExit as error:  # raised by uvicorn if it cannot listen; its log has said why
        address = f"{config.host}:{config.port}"
        raise ListenError(f"cannot listen at {address}: another server has the port, or it is not allowed") from error
    finally:
        announcing.cancel()
    if failure.done():
        failure.result()
    return 0
