"""Answer the captioning server's requests: images in, captions, embeddings and reconstructions out."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp
from torch import Tensor

from serve.core.batcher import Encoded
from serve.core.model import Model, ModelOptions
from serve.core.record import crop_fields, distinct_texts, joined
from serve.core.service import ServiceConfig
from serve.engines.base import Completion, Sampling
from serve.http import openai_api as api
from serve.http.admission import Admission, AdmissionLease
from serve.http.app import Bounds, info_of
from serve.http.auth import Keys, read_keys
from serve.http.errors import ApiError, invalid_value
from serve.http.fetch import Fetcher
from serve.http.gateway import EmbeddingsApp
from serve.http.incoming import gather_or_cancel, merge, read_bytes, read_fields, read_form, read_json
from serve.http.listener import ListenConfig, listen
from serve.http.reconstructor import ReconstructionParams, ReconstructionService
from serve.http.service import Service
from serve.http.web.browser import BrowserEncoder, is_script
from serve.http.web.page import DOCS, HEADERS, HEADERS_WITH_ENCODER, OPENAPI, PAGE
from vlv.common.command import Misuse
from vlv.data.decoding.crop import CROPS
from vlv.data.image import png

ONE_SQUARE = tuple(crop for crop in CROPS if crop != "tiles")  # of endpoints with one result an image
WARM_TOKENS = 8  # of the captions of a warm-up


@dataclass(frozen=True)
class ServerConfig(ListenConfig, ModelOptions):
    """The models of a captioning server, and what its requests may cost. Sizes are in MiB."""

    model_name: str | None = None  # None: the checkpoint folder's name
    queue: int | None = None  # images that may wait; None: those that can be captioned within the deadline
    image_host: tuple[str, ...] = ()  # hosts from which images are fetched
    max_body: int = 64  # of one request
    max_bodies: int = 512  # of all requests together
    max_image: int = 20  # of one fetched image
    max_images: int = 64  # images in one request
    max_pixels: int = 50_000_000
    web: Path | None = None  # folder web/ of an edge bundle, whose encoder runs in the page


class Routes(EmbeddingsApp):
    """The captioning server's application around a service."""

    def __init__(
        self, service: Service, model: str, keys: Keys, admission: Admission, fetcher: Fetcher, bounds: Bounds
    ):
        super().__init__(service, keys, admission, bounds)
        self.model = model
        self.fetcher = fetcher
        self.browser_encoder: BrowserEncoder | None = None
        self.crop = "center"  # for requests without the field: one of vlv.data.decoding.crop.CROPS
        self.reconstruction = ReconstructionService(service.checkpoint)
        self.queries = service.engine.spec.queries
        self.width = service.engine.spec.width

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        post = {
            "/v1/chat/completions": self.chat,
            "/v1/captions": self.captions,
            "/v1/embeddings": self.embed,
            "/v1/generate": self.generate,
            "/v1/reconstructions": self.reconstruct,
        }
        get = {
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.retrieve_model,
            "/openapi.json": self.openapi,
            "/docs": self.docs,
            "/browser/{name:path}": self.browser_file,
            "/": self.page,
        }
        return self.application(post, get)

    def describe(self) -> str:
        """Return the server's settings in one line."""
        engine, config = self.service.engine, self.service.config
        return (
            f"model {self.model}, language model by {engine.name}, encoder by {config.encoder}, at most "
            f"{engine.max_tokens} tokens a caption and {engine.in_flight} captions together, {self.keys.describe()}, "
            f"{self.bounds.deadline:g} s a request"
        )

    async def chat(self, request: Request, lease: AdmissionLease):
        """POST /v1/chat/completions"""
        start = time.monotonic()
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        url, params = api.image_url(body.get("messages")), self._params(request, body)
        stream, with_usage, usage_in_every = api.stream_options(body)
        lease.reserve(len(params.samplings) - 1)
        squares = (await self._encoded(await self.fetcher.get(url), params, lease)).squares
        prompt = self.queries * len(squares)
        if stream:
            chunks = api.Chunks(self.model, prompt, with_usage, usage_in_every)
            return self._stream(squares, params, chunks, start)
        completions = [joined(draw, params.raw) for draw in zip(*await self._caption(squares, params), strict=True)]
        return api.chat_completion(self.model, completions, params, prompt, self.service.engine.token_text)

    async def _encoded(self, content: bytes, params: api.CaptionParams, lease: AdmissionLease) -> Encoded:
        """Encode an image, and reserve its captions beyond the first square's. Raises ApiError."""
        encoded = await self.service.encoded(content, params.crop)
        lease.reserve((len(encoded.squares) - 1) * len(params.samplings))
        return encoded

    async def _pieces(self, squares: Tensor, sampling: Sampling, raw: bool) -> AsyncGenerator[Completion]:
        """Yield the pieces of one caption as they come; the captions of several squares come at once at the end."""
        if len(squares) == 1:
            async with aclosing(self.service.stream(squares[0], sampling)) as pieces:
                async for piece in pieces:
                    yield piece
        else:
            yield joined(await gather_or_cancel([self.service.caption(one, sampling) for one in squares]), raw)

    async def _stream(
        self, squares: Tensor, params: api.CaptionParams, chunks: api.Chunks, start: float
    ) -> AsyncGenerator[bytes]:
        """Yield the events of all choices as they come; one greedy caption is sent as every choice."""
        samplings = params.samplings
        texts = [api.StreamedText(params) for _ in samplings]
        pending: list[list[dict]] = [[] for _ in samplings]  # log probabilities that no event has carried yet
        silent = True

        def events(number: int, delta: dict, finish_reason: str | None = None) -> bytes:
            content, pending[number] = pending[number], []
            logprobs = {"content": content, "refusal": None} if content else None
            same = range(params.count) if len(samplings) == 1 else [number]
            return b"".join(chunks.event(index, delta, finish_reason, logprobs) for index in same)

        for number in range(len(samplings)):
            yield events(number, {"role": "assistant", "content": ""})
        async with aclosing(merge([self._pieces(squares, sampling, params.raw) for sampling in samplings])) as pieces:
            async for number, piece in pieces:
                chunks.tokens += len(piece.token_ids)
                if values := api.logprobs(piece, params.sampling.logprobs, self.service.engine.token_text):
                    pending[number] += values["content"]
                text = texts[number].push(piece.text) + (texts[number].end() if piece.finish_reason else "")
                if text and silent:
                    self.metrics.first_token.observe(time.monotonic() - start)
                    silent = False
                if text:
                    yield events(number, {"content": text})
                if piece.finish_reason:
                    yield events(number, {}, piece.finish_reason)
        yield chunks.end()

    async def _caption(self, squares: Tensor, params: api.CaptionParams) -> list[list[Completion]]:
        """Return the captions of each square of one image, one for each sampling."""
        count = len(params.samplings)
        work = [self.service.caption(square, sampling) for square in squares for sampling in params.samplings]
        flat = await gather_or_cancel(work)
        return [flat[first : first + count] for first in range(0, len(flat), count)]

    def _params(self, request: Request, body: dict) -> api.CaptionParams:
        """Read the decoding fields; a caption that is asked to be longer than possible is said in a header."""
        engine = self.service.engine
        params = api.caption_params(body, engine.max_tokens, engine.has_logprobs, self.crop)
        if params.clamped is not None:
            info_of(request).headers["X-VLV-Max-Tokens"] = str(params.clamped)
        return params

    async def captions(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/captions: an image file, multipart files, or JSON {"images": [url, ...]}; one result per image."""
        kind = request.headers.get("content-type", "").lower()
        if kind.startswith("multipart/form-data"):
            sources, body = await read_form(request, self.bounds.body_seconds, self.bounds.images)
        elif kind.startswith(("image/", "application/octet-stream")):
            content = await read_bytes(request, self.bounds.body_seconds)
            sources, body = [(None, _awaitable(content))], read_fields(request.query_params.multi_items())
        else:
            body = await read_json(request, self.bounds.body_seconds)
            sources = [(None, self.fetcher.get(url)) for url in api.image_urls(body, "images", self.bounds.images)]
        try:
            self._check_model(body)
            params = self._params(request, body)
            lease.reserve(len(sources) * len(params.samplings) - 1)
        except BaseException:
            for _, content in sources:
                content.close()  # never awaited
            raise
        results = await gather_or_cancel([self._result(i, *source, params, lease) for i, source in enumerate(sources)])
        return {"model": self.model, "captions": results}

    async def _result(
        self, index: int, name: str | None, content: Awaitable[bytes], params: api.CaptionParams, lease: AdmissionLease
    ) -> dict:
        result = {"index": index} | ({"filename": name} if name else {})
        try:
            encoded = await self._encoded(await content, params, lease)
            squares = await self._caption(encoded.squares, params)
        except ApiError as error:
            if error.status != 400 or error.code == "too_many":  # this one is about the request, not the image
                raise
            return result | api.error_body(error)
        completions = [joined(draw, params.raw) for draw in zip(*squares, strict=True)]
        texts = list(distinct_texts(completions, params.raw))
        tokens = sum(len(c.token_ids) for c in completions)
        more = {"captions": texts} if params.count > 1 else {}
        result |= {"caption": texts[0], **more, "tokens": tokens}
        result |= {"finish_reason": completions[0].finish_reason}
        return result | crop_fields(params.crop, encoded.boxes, squares, params.raw)

    async def embed(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/embeddings: `input` is one image URL or a list."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        urls, encoding = api.image_urls(body, "input", self.bounds.images), body.get("encoding_format") or "float"
        if encoding not in ("float", "base64") or body.get("dimensions") is not None:
            raise invalid_value("encoding_format", "encoding_format must be float or base64, and dimensions left out")
        crop = api.crop_of(body, self.crop, ONE_SQUARE)
        lease.reserve(len(urls) - 1)

        async def one(url: str):
            return await self.service.embed(await self.fetcher.get(url), crop)

        rows = await gather_or_cancel([one(url) for url in urls])
        return api.embeddings(self.model, rows, encoding, (self.queries, self.width))

    async def reconstruct(self, request: Request, lease: AdmissionLease) -> dict:
        """POST /v1/reconstructions: reconstruct one image from its embeddings, or mix two and caption the mixture."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        crop = api.crop_of(body, self.crop, ONE_SQUARE)
        urls, params = api.image_urls(body, "images", 2), ReconstructionParams.from_body(body)
        lease.reserve(len(urls) - 1)

        async def one(url: str):
            return await self.service.crop(await self.fetcher.get(url), crop)

        crops = await gather_or_cancel([one(url) for url in urls])
        with self.metrics.stage("reconstruct"):
            result = await self.reconstruction.reconstruct(crops, params)
        answer = {"model": self.model, "image": "data:image/png;base64," + base64.b64encode(result.png).decode()}
        if len(urls) == 2:  # a mixture has no caption yet
            caption_params = api.caption_params({}, self.service.engine.max_tokens)
            completion = await self.service.caption(result.prompts, caption_params.sampling)
            text = api.caption_text(completion, caption_params)
            answer |= {"caption": text, "tokens": len(completion.token_ids)}
        return answer

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        self.authenticate(request)
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def retrieve_model(self, request: Request) -> Response:
        """GET /v1/models/{model}"""
        self.authenticate(request)
        self._check_model(request.path_params)
        return JSONResponse(self._model_entry())

    def _model_entry(self) -> dict:
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "vlv"}
        shape = {"queries": self.queries, "width": self.width, "max_tokens": self.service.engine.max_tokens}
        parts = {"reconstructs": not self.reconstruction.unavailable_reason, "encodes": bool(self.browser_encoder)}
        return {**entry, **shape, **parts}

    async def openapi(self, _) -> Response:
        """GET /openapi.json: the description of this API."""
        return JSONResponse(OPENAPI)

    async def docs(self, _) -> Response:
        """GET /docs: the same as a page."""
        return HTMLResponse(DOCS, headers=HEADERS)

    async def page(self, _) -> Response:
        """GET /: the page."""
        return HTMLResponse(PAGE, headers=HEADERS_WITH_ENCODER if self.browser_encoder else HEADERS)

    async def browser_file(self, request: Request) -> Response:
        """GET /browser/{name}: a file of the encoder that runs in the page."""
        name = request.path_params["name"]
        if not is_script(name):
            self.authenticate(request)
        if self.browser_encoder is None:
            raise ApiError(404, "http", "this server was started without --web: the page sends images")
        return self.browser_encoder.response(name)

    def _check_model(self, body: dict) -> None:
        if body.get("model") not in (None, self.model):
            message = f"there is no such model here; there is {self.model}"
            raise ApiError(404, "model_not_found", message, param="model")


async def _awaitable(content: bytes) -> bytes:
    return content


@asynccontextmanager
async def open_routes(config: ServerConfig) -> AsyncIterator[Routes]:
    """Start the service, which loads its models in the background, and close it at the end. Raises Misuse."""
    keys = read_keys(config.keys, config.no_auth, config.host)
    model = Model.of(config)
    if config.web and config.crop != "center":
        raise Misuse(f"--web encodes the centre square, and --crop {config.crop} another part of the image")
    browser_encoder = BrowserEncoder(config.web, model.checkpoint) if config.web else None
    stages = ServiceConfig(
        config.prompt_batch,
        config.workers,
        config.max_pixels,
        config.encoder,
        config.artifacts,
        config.ignore_icc,
        config.precision,
        config.cuda_graphs,
        config.fast_jpeg,
    )
    service = Service(model.checkpoint, model.engine, stages)
    fetcher = Fetcher(tuple(config.image_host), config.max_image << 20)
    bounds = Bounds(config.deadline, config.body_seconds, config.max_body << 20, config.max_images)
    name = config.model_name or model.checkpoint.folder.resolve().name
    in_flight = service.engine.in_flight
    capacity = None if config.queue is None else in_flight + config.queue
    admission = Admission(capacity, config.max_bodies << 20, in_flight, config.deadline)
    try:
        await service.start()
        routes = Routes(service, name, keys, admission, fetcher, bounds)
        routes.access_log, routes.cors, routes.crop = config.access_log, tuple(config.cors), config.crop
        routes.browser_encoder = browser_encoder
        yield routes
    finally:
        await service.close()
        await fetcher.close()


async def warm_up(config: ServerConfig) -> int:
    """Load the models, caption one batch of blank images, and return 0: what is compiled is in the caches then."""
    async with open_routes(config) as routes:
        service = routes.service
        size, sampling = service.checkpoint.config.image_size, Sampling(min(WARM_TOKENS, service.engine.max_tokens))
        blank = png(np.zeros((3, size, size), np.uint8))

        async def caption() -> None:
            await service.captions((await service.encode(blank)).embeds, [sampling], wait=True)

        captions = asyncio.gather(*(caption() for _ in range(config.prompt_batch)))
        await asyncio.wait({captions, service.failure}, return_when=asyncio.FIRST_COMPLETED)
        if service.failure.done():
            captions.cancel()
            service.failure.result()
        await captions
    return 0


async def serve_captions(config: ServerConfig) -> int:
    """Run the captioning server until a signal; return the exit code."""
    async with open_routes(config) as routes:
        return await listen(routes.app(), routes, config, routes.service.failure)
