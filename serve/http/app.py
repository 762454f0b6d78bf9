"""What the servers share: admission, one deadline a request, disconnects, one clear refusal for what goes wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.http import openai_api as api
from serve.http.auth import Admission, ApiError, Keys
from serve.http.incoming import bounded, until_gone

GONE = 499  # nobody reads this answer: the client has closed the connection


@dataclass(frozen=True)
class Bounds:
    """What one request may cost."""

    deadline: float = 60  # seconds from the request to its last byte
    body_seconds: float = 20  # for the request to arrive
    body_bytes: int = 64 << 20
    images: int = 64


class Events(StreamingResponse):
    """Server-sent events that give back what the request holds, also where they are never begun."""

    def __init__(self, events: AsyncGenerator[bytes], held: ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._held = events, held

    async def __call__(self, scope, receive, send) -> None:
        with self._held:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


class CaptionApp:
    """An application whose `service` has `ready`, `check_ready` and `metrics`; `draining` refuses what is new."""

    def __init__(self, service, keys: Keys, admission: Admission, bounds: Bounds):
        self.service, self.keys, self.admission, self.bounds = service, keys, admission, bounds
        self.draining, self.metrics = False, service.metrics
        self.metrics.watch("active_images", lambda: admission.active)

    def application(self, work: dict[str, Callable], other: dict[str, Callable]) -> Starlette:
        """`work`: by path, what answers a POST with a dict or an iterator of events; `other`: plain GET routes."""
        routes = [Route(path, self._worker(path, work_on), methods=["POST"]) for path, work_on in work.items()]
        own = {"/health": self.health, "/ready": self.ready, "/metrics": self.prometheus}
        routes += [Route(path, answer) for path, answer in {**own, **other}.items()]
        handlers = {HTTPException: self._http_error, Exception: self._unexpected}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _worker(self, path: str, work_on: Callable) -> Callable:
        async def answer(request: Request) -> Response:
            try:
                with self.admission.body() as grow:
                    request = bounded(request, self.bounds.body_bytes, grow)
                    response = await until_gone(request, self._admitted(request, work_on))
            except ApiError as refusal:
                response = self.refused(refusal)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            except TimeoutError:
                response = self.refused(ApiError(504, "deadline", f"not done within {self.bounds.deadline:g} s"))
            except Exception:  # _unexpected answers
                self.metrics.requests.labels(path, 500).inc()
                raise
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return answer

    async def _admitted(self, request: Request, work_on: Callable) -> Response:
        if self.draining:
            raise ApiError(503, "draining", "the server is being shut down", 5)
        key = self.keys.find(request.headers.get("authorization"))
        self.service.check_ready()
        deadline = asyncio.get_running_loop().time() + self.bounds.deadline
        with ExitStack() as held:
            place = held.enter_context(self.admission.enter(key))
            async with asyncio.timeout_at(deadline):
                content = await work_on(request, place)
            if isinstance(content, dict):
                return JSONResponse(content)
            return Events(self._events(content, deadline), held.pop_all())

    async def _events(self, content: AsyncGenerator[bytes], deadline: float) -> AsyncGenerator[bytes]:
        """The status has been sent: from here on, the stream itself says what happened."""
        try:
            async with aclosing(content), asyncio.timeout_at(deadline):
                async for event in content:
                    yield event
        except ApiError as refusal:
            yield api.event(api.error_body(refusal))
        except TimeoutError:
            yield api.event(api.error_body(ApiError(504, "deadline", "the deadline has passed")))

    async def health(self, _) -> Response:
        """GET /health: the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _) -> Response:
        """GET /ready: captions can be written."""
        ready = self.service.ready and not self.draining
        state = "ready" if ready else "draining" if self.draining else "loading"
        return JSONResponse({"status": state}, 200 if ready else 503)

    async def prometheus(self, _) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def refused(self, refusal: ApiError) -> Response:
        """A refusal as an answer."""
        self.metrics.refused.labels(refusal.kind).inc()
        headers = {}
        if refusal.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(refusal.retry_after))
        if self.draining or refusal.status in (408, 413):
            headers["Connection"] = "close"
        return JSONResponse(api.error_body(refusal), refusal.status, headers)

    async def _http_error(self, _, error: HTTPException) -> Response:
        """No such route or method."""
        return JSONResponse(api.error_body(ApiError(error.status_code, "http", error.detail)), error.status_code)

    async def _unexpected(self, _, error: Exception) -> Response:
        return JSONResponse(api.error_body(ApiError(500, "internal", "an unexpected error: see the server's log")), 500)
