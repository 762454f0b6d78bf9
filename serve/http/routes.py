"""Answer the captioning server's requests: images in, captions, embeddings and reconstructions out."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from serve.command import Model
from serve.core.service import Service, ServiceConfig
from serve.http import openai_api as api
from serve.http.admission import Admission, AdmissionLease
from serve.http.app import Bounds, CaptionApp
from serve.http.auth import Keys, read_keys
from serve.http.errors import ApiError, invalid_request
from serve.http.fetch import Fetcher
from serve.http.incoming import gather_or_cancel, read_form, read_json
from serve.http.listener import ListenConfig, listen
from serve.http.reconstructor import ReconstructionParams, ReconstructionService
from serve.http.web.page import HEADERS, PAGE
from vlv.common.command import Misuse


@dataclass(frozen=True)
class ServerConfig(ListenConfig):
    """The models of a captioning server, and what its requests may cost. Sizes are in MiB."""

    ckpt: str | None = None  # checkpoint folder, published weights, or a hub id
    max_tokens: int | None = None  # longest caption; None: 300, or what fits
    in_flight: int = 256  # captions written together
    engine: str | None = None
    llm_url: str | None = None
    lora: Path | None = None
    tensor_parallel: int = 1
    encoder: str = "torch"
    artifacts: Path | None = None
    prompt_batch: int = 32  # images per encoder batch
    workers: int | None = None  # decode processes
    model_name: str | None = None  # None: the checkpoint folder's name
    queue: int = 128  # images that may wait
    image_host: tuple[str, ...] = ()  # hosts from which images are fetched
    max_body: int = 64  # of one request
    max_bodies: int = 512  # of all requests together
    max_image: int = 20  # of one fetched image
    max_images: int = 64  # images in one request
    max_pixels: int = 50_000_000


class Routes(CaptionApp):
    """The captioning server's application around a service."""

    def __init__(
        self, service: Service, model: str, keys: Keys, admission: Admission, fetcher: Fetcher, bounds: Bounds
    ):
        super().__init__(service, keys, admission, bounds)
        self.model = model
        self.fetcher = fetcher
        self.reconstruction = ReconstructionService(service.checkpoint)
        self.queries = service.engine.spec.queries
        self.width = service.engine.spec.width

    def app(self) -> Starlette:
        """Return the ASGI application."""
        post = {
            "/v1/chat/completions": self.chat,
            "/v1/captions": self.captions,
            "/v1/embeddings": self.embed,
            "/v1/reconstructions": self.reconstruct,
        }
        return self.application(post, {"/v1/models": self.models, "/": self.page})

    async def chat(self, request: Request, lease: AdmissionLease):
        """POST /v1/chat/completions"""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        start = time.monotonic()
        url, params = api.image_url(body.get("messages")), api.caption_params(body, self.service.engine.max_tokens)
        if body.get("stream") and (params.count > 1 or params.as_json):
            raise invalid_request("stream goes with n = 1 and response_format text")
        lease.reserve(params.count - 1)
        embeds = await self.service.embed(await self.fetcher.get(url))
        if body.get("stream"):
            options = body.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            return self._stream(embeds, params, with_usage, start)
        completions = await self._caption(embeds, params)
        tokens = sum(len(c.token_ids) for c in completions)
        return api.chat_completion(self.model, api.unique_texts(completions, params), params, self.queries, tokens)

    async def _stream(self, embeds, params: api.CaptionParams, with_usage: bool, start: float) -> AsyncGenerator[bytes]:
        chunks, cleaner, tokens, silent = api.Chunks(self.model), api.Cleaner(), 0, True

        def text_event(text: str) -> bytes:
            nonlocal silent
            if silent:
                self.metrics.first_token.observe(time.monotonic() - start)
                silent = False
            return chunks.event({"content": text})

        yield chunks.event({"role": "assistant", "content": ""})
        async with aclosing(self.service.stream(embeds, params.sampling)) as pieces:
            async for piece in pieces:
                tokens += len(piece.token_ids)
                if text := piece.text if params.raw else cleaner.push(piece.text):
                    yield text_event(text)
                reason = piece.finish_reason
        if not params.raw and (text := cleaner.end()):
            yield text_event(text)
        yield chunks.event({}, reason)
        if with_usage:
            yield chunks.usage(self.queries, tokens)
        yield api.DONE

    async def _caption(self, embeds, params: api.CaptionParams) -> list:
        """Return the captions of one image, each with a seed of its own."""
        first = params.sampling
        samplings = [replace(first, seed=first.seed + i) for i in range(params.count)]
        return await gather_or_cancel([self.service.caption(embeds, sampling) for sampling in samplings])

    async def captions(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/captions: multipart files, or JSON {"images": [url, ...]}; one result per image, in order."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            sources, body = await read_form(request, self.bounds.body_seconds, self.bounds.images)
        else:
            body = await read_json(request, self.bounds.body_seconds)
            sources = [(None, self.fetcher.get(url)) for url in api.image_urls(body, "images", self.bounds.images)]
        try:
            self._check_model(body)
            params = api.caption_params(body, self.service.engine.max_tokens)
            lease.reserve(len(sources) * params.count - 1)
        except BaseException:
            for _, content in sources:
                content.close()  # never awaited
            raise
        results = await gather_or_cancel([self._result(i, *source, params) for i, source in enumerate(sources)])
        return {"model": self.model, "captions": results}

    async def _result(self, index: int, name: str | None, content: Awaitable[bytes], params: api.CaptionParams) -> dict:
        result = {"index": index} | ({"filename": name} if name else {})
        try:
            completions = await self._caption(await self.service.embed(await content), params)
        except ApiError as error:
            if error.status != 400:
                raise
            return result | api.error_body(error)
        (text, first), *others = api.unique_texts(completions, params)
        more = {"captions": [text, *(t for t, _ in others)]} if params.count > 1 else {}
        tokens = sum(len(c.token_ids) for c in completions)
        return {**result, "caption": text, **more, "tokens": tokens, "finish_reason": first.finish_reason}

    async def embed(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/embeddings: `input` is one image URL or a list."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        urls, encoding = api.image_urls(body, "input", self.bounds.images), body.get("encoding_format") or "float"
        if encoding not in ("float", "base64") or body.get("dimensions") is not None:
            raise invalid_request("encoding_format must be float or base64, and dimensions left out")
        lease.reserve(len(urls) - 1)

        async def one(url: str):
            return await self.service.embed(await self.fetcher.get(url))

        rows = await gather_or_cancel([one(url) for url in urls])
        return api.embeddings(self.model, rows, encoding, (self.queries, self.width))

    async def reconstruct(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/reconstructions: reconstruct one image from its embeddings, or mix two and caption the mixture."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        urls, params = api.image_urls(body, "images", 2), ReconstructionParams.from_body(body)
        lease.reserve(len(urls) - 1)

        async def one(url: str):
            return await self.service.crop(await self.fetcher.get(url))

        crops = await gather_or_cancel([one(url) for url in urls])
        with self.metrics.stage("draw"):
            result = await self.reconstruction.reconstruct(crops, params)
        answer = {"model": self.model, "picture": "data:image/png;base64," + base64.b64encode(result.png).decode()}
        if len(urls) == 2:  # a mixture has no caption yet
            caption_params = api.caption_params({}, self.service.engine.max_tokens)
            completion = await self.service.caption(result.prompts, caption_params.sampling)
            ((text, _),) = api.unique_texts([completion], caption_params)
            answer |= {"caption": text, "tokens": len(completion.token_ids)}
        return answer

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        try:
            self.keys.find(request.headers.get("authorization"))
        except ApiError as error:
            return self.error_response(error)
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "vlv"}
        shape = {"queries": self.queries, "width": self.width, "max_tokens": self.service.engine.max_tokens}
        features = {"reconstructs": not self.reconstruction.unavailable_reason}
        return JSONResponse({"object": "list", "data": [{**entry, **shape, **features}]})

    async def page(self, _) -> Response:
        """GET /: the page."""
        return HTMLResponse(PAGE, headers=HEADERS)

    def _check_model(self, body: dict) -> None:
        if body.get("model") not in (None, self.model):
            raise ApiError(404, "model_not_found", f"there is no such model here; there is {self.model}")


@asynccontextmanager
async def open_routes(config: ServerConfig) -> AsyncIterator[Routes]:
    """Start the service, which loads its models in the background, and close it at the end. Raises Misuse."""
    if not config.ckpt:
        raise Misuse("--ckpt is needed (--help shows the usage)")
    keys = read_keys(config.keys, config.no_auth, config.host)
    model = Model.of(config)  # pyright: ignore[reportArgumentType]
    stages = ServiceConfig(config.prompt_batch, config.workers, config.max_pixels, config.encoder, config.artifacts)
    service = Service(model.checkpoint, model.engine, stages)
    fetcher = Fetcher(tuple(config.image_host), config.max_image << 20)
    bounds = Bounds(config.deadline, config.body_seconds, config.max_body << 20, config.max_images)
    name = config.model_name or model.checkpoint.folder.resolve().name
    admission = Admission(config.in_flight + config.queue, config.max_bodies << 20)
    try:
        await service.start()
        yield Routes(service, name, keys, admission, fetcher, bounds)
    finally:
        await service.close()
        await fetcher.close()


async def serve_captions(config: ServerConfig) -> int:
    """Run the captioning server until a signal; return the exit code."""
    async with open_routes(config) as routes:
        return await listen(routes.app(), routes, config, routes.service.failure)
