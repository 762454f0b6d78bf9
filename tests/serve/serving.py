"""Run a server in this process around an engine that needs no model: for the tests of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import uvicorn
import uvloop

from serve.core.service import ServiceConfig
from serve.engines.base import EngineError, LLMEngine, LLMSpec
from serve.http.admission import Admission
from serve.http.app import Bounds
from serve.http.auth import Keys
from serve.http.fetch import Fetcher
from serve.http.routes import Routes
from serve.http.service import Service
from serve.http.web.browser import BrowserEncoder

TEXT = "The image shows a cat. It is red! The image shows a cat. A dog is left of it. Its"
CLEAN = "The image shows a cat. It is red! A dog is left of it."


class Scripted(LLMEngine):
    """Write TEXT, a token every `pace` seconds; count open requests, and die on demand."""

    name = "scripted"
    pace, running, cancelled, dead, starts = 0.001, 0, 0, False, 0

    async def start(self) -> None:
        self._load_tokenizer()
        type(self).starts += 1

    @property
    def alive(self) -> bool:
        return not self.dead

    async def tokens(self, embeds, sampling, every):
        self.spec.check(embeds)
        cls = type(self)
        cls.running += 1
        try:
            for token in self._tokenizer(TEXT, add_special_tokens=False).input_ids[: sampling.max_tokens]:
                await asyncio.sleep(cls.pace)
                if self.dead:
                    raise EngineError("it died")
                yield [token]
        except (asyncio.CancelledError, GeneratorExit):
            cls.cancelled += 1
            raise
        finally:
            cls.running -= 1

    async def close(self) -> None:
        pass


class Recorded:
    """The bodies of POST requests that reach a server."""

    def __init__(self, app):
        self.app, self.bodies = app, []

    async def __call__(self, scope, receive, send):
        body = bytearray()

        async def recording():
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await self.app(scope, recording, send)
        if scope["type"] == "http" and scope["method"] == "POST":
            self.bodies.append(bytes(body))


class Running:
    """Run a server in a thread."""

    def __init__(self, checkpoint, engine, capacity=64, keys=None, fetcher=None, bounds=None, cors=(), web=None):
        self.cors, self.engine, self.web = cors, engine, web
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._make = lambda: (checkpoint, capacity, keys or Keys(), fetcher or Fetcher(), bounds or Bounds())
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 100
        while not self.is_ready():
            assert time.monotonic() < deadline and self._thread.is_alive(), "the server does not get ready"
            time.sleep(0.05)

    async def _serve(self) -> None:
        checkpoint, capacity, keys, fetcher, bounds = self._make()
        self.service = Service(
            checkpoint, lambda: self.engine(LLMSpec.of(checkpoint), 100, 8), ServiceConfig(8, 1, 1_000_000)
        )
        self.routes = Routes(
            self.service, "tiny", keys, Admission(capacity, in_flight=8, deadline=bounds.deadline), fetcher, bounds
        )
        self.routes.cors = self.cors
        self.routes.browser_encoder = BrowserEncoder(self.web, checkpoint) if self.web else None
        self.recorded = Recorded(self.routes.app())
        self._server = uvicorn.Server(uvicorn.Config(self.recorded, port=self.port, log_level="error"))
        await self.service.start()
        await self._server.serve()
        await self.service.close()
        await fetcher.close()

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + "/ready").status_code == 200
        return False

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
