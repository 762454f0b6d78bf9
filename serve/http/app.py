"""Build the application that both servers share: admission, one deadline per request, disconnects, one error format."""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from serve.http import openai_api as api
from serve.http.admission import Admission
from serve.http.auth import Key, Keys
from serve.http.errors import ApiError
from serve.http.incoming import cancel_on_disconnect, limit_body
from vlv.common.command import one_line, say

PROBES = ("/health", "/ready", "/metrics")  # their errors are no news
MAX_LINES = 20  # of errors in the log per second
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # ids that are taken over from the client
EXPOSED_HEADERS = [
    "X-Request-Id",
    "Retry-After",
    "X-VLV-Max-Tokens",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
]
CLIENT_CLOSED_REQUEST = 499  # nginx's code: the client has closed the connection, nobody reads the response


@dataclass(frozen=True)
class Bounds:
    """The limits of one request."""

    deadline: float = 60  # seconds from the request to the last byte of its response
    body_seconds: float = 20  # seconds for the request to arrive
    body_bytes: int = 64 << 20
    images: int = 64


@dataclass
class RequestInfo:
    """What is said about a request beside its response: in the log, and in headers."""

    id: str
    key: Key | None = None
    error: str = ""
    headers: dict[str, str] = field(default_factory=dict)  # of the response


def info_of(request: Request) -> RequestInfo:
    """Return the information that RequestLog keeps for a request."""
    return request.scope["vlv"]


class RequestLog:
    """Give each request an id, add its headers to the response, and log errors, or with `all` every request."""

    def __init__(self, app: ASGIApp, all: bool):
        self._app = app
        self._all = all
        self._second = 0
        self._lines = 0  # in this second

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0
        sent = Headers(scope=scope).get("x-request-id", "")
        info = scope["vlv"] = RequestInfo(sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex)

        async def send_with_headers(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                limits = info.key.rate_headers(time.monotonic()) if info.key and info.key.limited else {}
                headers = MutableHeaders(scope=message)
                for name, value in {"X-Request-Id": info.id, **limits, **info.headers}.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            failed = (status >= 400 or info.error) and scope["path"] not in PROBES
            if failed or self._all:
                self._log(scope, status, info, time.monotonic() - start)

    def _log(self, scope, status: int, info: RequestInfo, seconds: float) -> None:
        """Print one line; under a flood of errors only the first MAX_LINES of each second."""
        now = time.time()
        if int(now) != self._second:
            if not self._all and self._lines > MAX_LINES:
                say(f"{self._lines - MAX_LINES} more errors in the second before")
            self._second, self._lines = int(now), 0
        self._lines += 1
        if self._lines > MAX_LINES and not self._all:
            return
        client = (scope.get("client") or ("-",))[0]
        path = scope["path"][:200].encode("unicode_escape").decode()
        words = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)), client, scope["method"], path, str(status)]
        words += [f"{1000 * seconds:.0f}ms", f"id={info.id}"]
        words += [f"key={info.key.name}"] if info.key and info.key.limited else []
        say(" ".join(words) + (f": {' '.join(info.error.split())}" if info.error else ""))


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
        self.cors: tuple[str, ...] = ()  # origins whose pages may call this server
        self.access_log = False
        self.service = service
        self.keys = keys
        self.admission = admission
        self.bounds = bounds
        self.draining = False
        self.metrics = service.metrics
        self.metrics.watch("active_images", lambda: admission.active)

    def application(self, post: dict[str, Callable], get: dict[str, Callable]) -> ASGIApp:
        """Return the ASGI application. `post`: path -> handler that returns a dict or an iterator of events."""
        routes = [Route(path, self._endpoint(path, handler), methods=["POST"]) for path, handler in post.items()]
        common = {"/health": self.health, "/ready": self.ready, "/metrics": self.prometheus}
        routes += [Route(path, endpoint) for path, endpoint in {**common, **get}.items()]
        handlers = {ApiError: self._api_error, HTTPException: self._http_error, Exception: self._unexpected}
        app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
        if self.cors:
            app = CORSMiddleware(
                app, self.cors, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
            )
        return RequestLog(app, self.access_log)

    def describe(self) -> str:
        """Return the server's settings in one line."""
        return self.keys.describe()

    def _endpoint(self, path: str, handler: Callable) -> Callable:
        async def respond(request: Request) -> Response:
            try:
                with self.admission.body() as add:
                    request = limit_body(request, self.bounds.body_bytes, add)
                    response = await cancel_on_disconnect(request, self._admitted(request, handler))
            except ApiError as error:
                response = self.error_response(request, error)
            except ClientDisconnect:
                info_of(request).error = "the client has closed the connection"
                response = Response(status_code=CLIENT_CLOSED_REQUEST)
            except TimeoutError:
                error = ApiError(504, "deadline", f"not done within {self.bounds.deadline:g} s")
                response = self.error_response(request, error)
            except Exception:  # answered by _unexpected
                self.metrics.requests.labels(path, 500).inc()
                raise
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return respond

    async def _admitted(self, request: Request, handler: Callable) -> Response:
        if self.draining:
            raise ApiError(503, "draining", "the server is being shut down", 5)
        key = self.authenticate(request)
        self.service.check_ready()
        deadline = asyncio.get_running_loop().time() + self.bounds.deadline
        with ExitStack() as held:
            lease = held.enter_context(self.admission.enter(key))
            async with asyncio.timeout_at(deadline):
                content = await handler(request, lease)
            if isinstance(content, dict):
                return JSONResponse(content)
            return EventStream(self._events(request, content, deadline), held.pop_all())

    def authenticate(self, request: Request) -> Key:
        """Return the caller's key. Raises ApiError 401."""
        key = info_of(request).key = self.keys.find(request.headers.get("authorization"))
        return key

    async def _events(self, request: Request, content: AsyncGenerator[bytes], deadline: float) -> AsyncGenerator[bytes]:
        """Pass the events on; the status has been sent already, so that an error becomes an event."""
        try:
            async with aclosing(content), asyncio.timeout_at(deadline):
                async for event in content:
                    yield event
        except (ApiError, TimeoutError) as raised:
            error = raised if isinstance(raised, ApiError) else ApiError(504, "deadline", "the deadline has passed")
            info_of(request).error = str(error)
            yield api.event(api.error_body(error))

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

    def error_response(self, request: Request, error: ApiError) -> Response:
        """Return an error as an HTTP response."""
        self.metrics.refused.labels(error.code).inc()
        info_of(request).error = str(error)
        headers = dict(error.headers)
        if error.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        if self.draining or error.status in (408, 413):
            headers["Connection"] = "close"
        return JSONResponse(api.error_body(error), error.status, headers)

    async def _api_error(self, request: Request, error: ApiError) -> Response:
        return self.error_response(request, error)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """Answer a request for a route or method that does not exist."""
        info_of(request).error = error.detail
        body = api.error_body(ApiError(error.status_code, "http", error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    async def _unexpected(self, request: Request, error: Exception) -> Response:
        info_of(request).error = one_line(error)
        return JSONResponse(api.error_body(ApiError(500, "internal", "an unexpected error: see the server's log")), 500)
