"""Check prompt embeddings from other machines and pass them to a vLLM on this one.

vLLM's own API takes pickled tensors, which let a sender run code. This server takes safetensors only, and checks shape,
dtype and finiteness.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from safetensors import SafetensorError
from safetensors.torch import load
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp
from torch import Tensor

from serve.engines.base import EmbedsError, EngineError, LLMEngine, LLMSpec, Options, Sampling
from serve.engines.remote import RemoteEngine
from serve.http import openai_api as api
from serve.http.admission import Admission, AdmissionLease
from serve.http.app import Bounds, CaptionApp
from serve.http.auth import read_keys
from serve.http.errors import ApiError, invalid_request, invalid_value
from serve.http.incoming import read_bytes
from serve.http.listener import ListenConfig, listen
from serve.http.metrics import Metrics

HEADER = "x-vlv-sampling"
FIELDS = {*"max_tokens temperature seed top_p top_k min_p min_tokens ignore_eos stream".split()}  # of HEADER
WATCH = 1  # seconds between two checks of vLLM


class Upstream:
    """Watch the vLLM behind the gateway: `ready` while it answers."""

    def __init__(self, engine: LLMEngine, metrics: Metrics):
        self.engine = engine
        self.metrics = metrics
        self.ready = False
        self.failure = asyncio.get_running_loop().create_future()
        metrics.watch("ready", lambda: self.ready)
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        try:
            await self.engine.start()
            while True:
                self.ready = await self.engine.healthy()
                await asyncio.sleep(WATCH)
        except Exception as error:
            self.failure.set_exception(error)

    def check_ready(self) -> None:
        """Raise ApiError 503 while vLLM does not answer."""
        if not self.ready:
            raise ApiError(503, "not_ready", "the language model does not answer", 10)

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        """Continue embeds [queries, width]; closing this cancels vLLM's request. Raises ApiError."""
        try:
            async with aclosing(self.engine.tokens(embeds, sampling, every)) as steps:
                async for ids in steps:
                    self.metrics.tokens.inc(len(ids))
                    yield ids
        except EmbedsError as error:
            raise invalid_request(str(error)) from error
        except EngineError as error:
            raise ApiError(503, "engine", "the language model does not answer", 10) from error

    async def close(self) -> None:
        """Stop watching and close the engine."""
        self._task.cancel()
        await self.engine.close()


class EmbeddingsApp(CaptionApp):
    """Take embeddings and return token ids, in the format of OpenAI's completions; the service has an engine."""

    async def generate(self, request: Request, lease: AdmissionLease | None):
        """POST /v1/generate"""
        engine = self.service.engine
        fields = sampling_fields(request.headers.get(HEADER, "{}"))
        stream = fields.get("stream", False)
        params = api.caption_params(fields, engine.max_tokens)
        if params.clamped is not None:
            raise invalid_value("max_tokens", f"max_tokens must be an integer from 1 to {params.clamped}")
        embeds = read_embeds(await read_bytes(request, self.bounds.body_seconds), engine.spec)
        if stream:
            return self._stream_ids(embeds, params.sampling)
        async with aclosing(self.service.tokens(embeds, params.sampling, every=False)) as steps:
            ids = [i async for step in steps for i in step]
        reason = "stop" if any(i in engine.ends for i in ids) else "length"
        return {"choices": [{"token_ids": ids, "finish_reason": reason}]}

    async def _stream_ids(self, embeds: Tensor, sampling: Sampling) -> AsyncGenerator[bytes]:
        async with aclosing(self.service.tokens(embeds, sampling, every=True)) as steps:
            async for ids in steps:
                yield api.event({"choices": [{"token_ids": ids, "finish_reason": None}]})


class Gateway(EmbeddingsApp):
    """The routes of the gateway."""

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        return self.application({"/v1/generate": self.generate}, {"/v1/models": self.models})

    async def models(self, _) -> Response:
        """GET /v1/models"""
        engine = self.service.engine
        entry = {"id": "vlv", "object": "model", "accepts": "safetensors", "max_tokens": engine.max_tokens}
        return JSONResponse({"data": [{**entry, "queries": engine.spec.queries, "width": engine.spec.width}]})


def sampling_fields(header: str) -> dict:
    """Parse the header X-VLV-Sampling. Raises ApiError for fields that the gateway does not take."""
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise invalid_request(f"the header {HEADER} is no JSON object")
    if others := sorted(fields.keys() - FIELDS):
        raise invalid_request(f"{HEADER} holds {', '.join(sorted(FIELDS))}, not {others[0][:40]}")
    if not isinstance(fields.get("stream", False), bool):
        raise invalid_request("stream must be true or false")
    return fields


def read_embeds(content: bytes, spec: LLMSpec) -> Tensor:
    """Read embeds [queries, width] from a request's body, and check them. Raises ApiError."""
    try:
        tensors = load(content)
        if tensors.keys() != {"embeds"}:
            raise EmbedsError(f"the body must hold one tensor, embeds, not {sorted(tensors)[:5]}")
        spec.check(tensors["embeds"])
    except EmbedsError as error:
        raise invalid_request(str(error)) from error
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise invalid_request("the body is no safetensors") from error
    return tensors["embeds"]


async def serve_gateway(spec: LLMSpec, max_tokens: int, in_flight: int, url: str, config: ListenConfig) -> int:
    """Serve the gateway to the vLLM at `url` until a signal; return the exit code."""
    keys = read_keys(config.keys, config.no_auth, config.host)
    engine = RemoteEngine(spec, max_tokens, in_flight, config.debug, Options(url=url))
    engine.patience = math.inf  # vLLM may take long to load, and to come back
    upstream = Upstream(engine, Metrics())
    float32_and_header = spec.queries * spec.width * 4 + 4096
    bounds = Bounds(config.deadline, config.body_seconds, float32_and_header, 1)
    gateway = Gateway(upstream, keys, Admission(in_flight), bounds)
    gateway.access_log, gateway.cors = config.access_log, tuple(config.cors)
    try:
        return await listen(gateway.app(), gateway, config, upstream.failure)
    finally:
        await upstream.close()
