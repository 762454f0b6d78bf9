"""Build the application that both servers share: admission, one deadline per request, disconnects, one error format."""

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
from serve.http.admission import Admission
from serve.http.auth import Keys
from serve.http.errors import ApiError
from serve.http.incoming import cancel_on_disconnect, limit_body

CLIENT_CLOSED_REQUEST = 499  # nginx's code: the client has closed the connection, nobody reads the response


@dataclass(frozen=True)
class Bounds:
    """The limits of one request."""

    deadline: float = 60  # seconds from the request to the last byte of its response
    body_seconds: float = 20  # seconds for the request to arrive
    body_bytes: int = 64 << 20
    images: int = 64


class EventStream(StreamingResponse):
    """Send server-sent events, and release what the request holds even if the stream never begins."""

    def __init__(self, events: AsyncGenerator[bytes], held: ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events
        self._held = held

    async def __call__(self, scope, receive, send) -> None:
        with self._held:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


class CaptionApp:
    """Answer requests for a `service` with `ready`, `check_ready` and `metrics`; new ones are refused if `draining`."""

    def __init__(self, service, keys: Keys, admission: Admission, bounds: Bounds):
        self.service = service
        self.keys = keys
        self.admission = admission
        self.bounds = bounds
        self.draining = False
        self.metrics = service.metrics
        self.metrics.watch("active_images", lambda: admission.active)

    def application(self, post: dict[str, Callable], get: dict[str, Callable]) -> Starlette:
        """Return the ASGI application. `post`: path -> handler that returns a dict or an iterator of events."""
        routes = [Route(path, self._endpoint(path, handler), methods=["POST"]) for path, handler in post.items()]
        common = {"/health": self.health, "/ready": self.ready, "/metrics": self.prometheus}
        routes += [Route(path, endpoint) for path, endpoint in {**common, **get}.items()]
        handlers = {HTTPException: self._http_error, Exception: self._unexpected}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _endpoint(self, path: str, handler: Callable) -> Callable:
        async def respond(request: Request) -> Response:
            try:
                with self.admission.body() as add:
                    request = limit_body(request, self.bounds.body_bytes, add)
                    response = await cancel_on_disconnect(request, self._admitted(request, handler))
            except ApiError as error:
                response = self.error_response(error)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_CLOSED_REQUEST)
            except TimeoutError:
                response = self.error_response(ApiError(504, "deadline", f"not done within {self.bounds.deadline:g} s"))
            except Exception:  # answered by _unexpected
                self.metrics.requests.labels(path, 500).inc()
                raise
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return respond

    async def _admitted(self, request: Request, handler: Callable) -> Response:
        if self.draining:
            raise ApiError(503, "draining", "the server is being shut down", 5)
        key = self.keys.find(request.headers.get("authorization"))
        self.service.check_ready()
        deadline = asyncio.get_running_loop().time() + self.bounds.deadline
        with ExitStack() as held:
            lease = held.enter_context(self.admission.enter(key))
            async with asyncio.timeout_at(deadline):
                content = await handler(request, lease)
            if isinstance(content, dict):
                return JSONResponse(content)
            return EventStream(self._events(content, deadline), held.pop_all())

    async def _events(self, content: AsyncGenerator[bytes], deadline: float) -> AsyncGenerator[bytes]:
        """Pass the events on; the status has been sent already, so that an error becomes an event."""
        try:
            async with aclosing(content), asyncio.timeout_at(deadline):
                async for event in content:
                    yield event
        except ApiError as error:
            yield api.event(api.error_body(error))
        except TimeoutError:
            yield api.event(api.error_body(ApiError(504, "deadline", "the deadline has passed")))

    async def health(self, _) -> Response:
        """GET /health: the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _) -> Response:
        """GET /ready: images can be captioned."""
        ready = self.service.ready and not self.draining
        state = "ready" if ready else "draining" if self.draining else "loading"
        return JSONResponse({"status": state}, 200 if ready else 503)

    async def prometheus(self, _) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def error_response(self, error: ApiError) -> Response:
        """Return an error as an HTTP response."""
        self.metrics.refused.labels(error.code).inc()
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        if self.draining or error.status in (408, 413):
            headers["Connection"] = "close"
        return JSONResponse(api.error_body(error), error.status, headers)

    async def _http_error(self, _, error: HTTPException) -> Response:
        """Answer a request for a route or method that does not exist."""
        return JSONResponse(api.error_body(ApiError(error.status_code, "http", error.detail)), error.status_code)

    async def _unexpected(self, _, error: Exception) -> Response:
        return JSONResponse(api.error_body(ApiError(500, "internal", "an unexpected error: see the server's log")), 500)
