"""The routes of the captioning server: pictures in, captions and embeddings out."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from serve.http import openai_api as api
from serve.http.app import Bounds, CaptionApp
from serve.http.auth import Admission, AdmissionLease, ApiError, Keys
from serve.http.fetch import Fetcher
from serve.http.incoming import all_of, read_form, read_json
from serve.http.page import HEADERS, PAGE
from serve.http.reconstructor import Drawing, ReconstructionService
from serve.http.service import Service


class Routes(CaptionApp):
    """The application around a service."""

    def __init__(
        self, service: Service, model: str, keys: Keys, admission: Admission, fetcher: Fetcher, bounds: Bounds
    ):
        super().__init__(service, keys, admission, bounds)
        self.model, self.fetcher, self.painter = model, fetcher, ReconstructionService(service.checkpoint)
        self.queries, self.width = service.engine.spec.queries, service.engine.spec.width

    def app(self) -> Starlette:
        """The ASGI application."""
        work = {"/v1/chat/completions": self.chat, "/v1/captions": self.captions, "/v1/embeddings": self.embed}
        work["/v1/reconstructions"] = self.draw
        return self.application(work, {"/v1/models": self.models, "/": self.page})

    async def chat(self, request: Request, place: AdmissionLease):
        """POST /v1/chat/completions"""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        start = time.monotonic()
        url, wanted = api.image_of(body.get("messages")), api.wish(body, self.service.engine.max_tokens)
        if body.get("stream") and (wanted.count > 1 or wanted.as_json):
            raise ApiError(400, "invalid_request", "stream goes with n = 1 and response_format text")
        place.take(wanted.count - 1)
        embeds = await self.service.embed(await self.fetcher.get(url))
        if body.get("stream"):
            options = body.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            return self._stream(embeds, wanted, with_usage, start)
        completions = await self._write(embeds, wanted)
        tokens = sum(len(c.token_ids) for c in completions)
        return api.chat(self.model, api.finished(completions, wanted), wanted, self.queries, tokens)

    async def _stream(self, embeds, wanted: api.CaptionParams, with_usage: bool, start: float) -> AsyncGenerator[bytes]:
        chunks, cleaner, tokens, silent = api.Chunks(self.model), api.Cleaner(), 0, True

        def said(text: str) -> bytes:
            nonlocal silent
            if silent:
                self.metrics.first_token.observe(time.monotonic() - start)
                silent = False
            return chunks.event({"content": text})

        yield chunks.event({"role": "assistant", "content": ""})
        async with aclosing(self.service.stream(embeds, wanted.sampling)) as pieces:
            async for piece in pieces:
                tokens += len(piece.token_ids)
                if text := piece.text if wanted.raw else cleaner.push(piece.text):
                    yield said(text)
                reason = piece.finish_reason
        if not wanted.raw and (text := cleaner.end()):
            yield said(text)
        yield chunks.event({}, reason)
        if with_usage:
            yield chunks.usage(self.queries, tokens)
        yield api.DONE

    async def _write(self, embeds, wanted: api.CaptionParams) -> list:
        """The captions of one image, each from a seed of its own."""
        first = wanted.sampling
        draws = [replace(first, seed=first.seed + i) for i in range(wanted.count)]
        return await all_of([self.service.caption(embeds, draw) for draw in draws])

    async def captions(self, request: Request, place: AdmissionLease) -> dict:
        """POST /v1/captions: multipart files, or JSON {"images": [url, ...]}; one result an image, in order."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            sources, body = await read_form(request, self.bounds.body_seconds, self.bounds.images)
        else:
            body = await read_json(request, self.bounds.body_seconds)
            sources = [(None, self.fetcher.get(url)) for url in api.urls_of(body, "images", self.bounds.images)]
        try:
            self._check_model(body)
            wanted = api.wish(body, self.service.engine.max_tokens)
            place.take(len(sources) * wanted.count - 1)
        except BaseException:
            for _, content in sources:
                content.close()  # never awaited
            raise
        return {
            "model": self.model,
            "captions": await all_of([self._result(i, *s, wanted) for i, s in enumerate(sources)]),
        }

    async def _result(self, index: int, name: str | None, content: Awaitable[bytes], wanted) -> dict:
        result = {"index": index} | ({"filename": name} if name else {})
        try:
            completions = await self._write(await self.service.embed(await content), wanted)
        except ApiError as refusal:
            if refusal.status != 400:
                raise
            return result | api.error_body(refusal)
        (text, first), *others = api.finished(completions, wanted)
        more = {"captions": [text, *(t for t, _ in others)]} if wanted.count > 1 else {}
        tokens = sum(len(c.token_ids) for c in completions)
        return {**result, "caption": text, **more, "tokens": tokens, "finish_reason": first.finish_reason}

    async def embed(self, request: Request, place: AdmissionLease) -> dict:
        """POST /v1/embeddings: `input` is one image URL or several."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        urls, encoding = api.urls_of(body, "input", self.bounds.images), body.get("encoding_format") or "float"
        if encoding not in ("float", "base64") or body.get("dimensions") is not None:
            raise ApiError(400, "invalid_request", "encoding_format must be float or base64, and dimensions left out")
        place.take(len(urls) - 1)

        async def one(url: str):
            return await self.service.embed(await self.fetcher.get(url))

        rows = await all_of([one(url) for url in urls])
        return api.embeddings(self.model, rows, encoding, (self.queries, self.width))

    async def draw(self, request: Request, place: AdmissionLease) -> dict:
        """POST /v1/reconstructions: what one image's embeddings hold, drawn; of two their mixture, with a caption."""
        body = await read_json(request, self.bounds.body_seconds)
        self._check_model(body)
        urls, drawing = api.urls_of(body, "images", 2), Drawing.of(body)
        place.take(len(urls) - 1)

        async def one(url: str):
            return await self.service.crop(await self.fetcher.get(url))

        crops = await all_of([one(url) for url in urls])
        with self.metrics.stage("draw"):
            drawn = await self.painter.paint(crops, drawing)
        answer = {"model": self.model, "picture": "data:image/png;base64," + base64.b64encode(drawn.png).decode()}
        if len(urls) == 2:  # a mixture has no caption yet
            wanted = api.wish({}, self.service.engine.max_tokens)
            completion = await self.service.caption(drawn.prompts, wanted.sampling)
            ((text, _),) = api.finished([completion], wanted)
            answer |= {"caption": text, "tokens": len(completion.token_ids)}
        return answer

    async def models(self, request: Request) -> Response:
        try:
            self.keys.find(request.headers.get("authorization"))
        except ApiError as refusal:
            return self.refused(refusal)
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "vlv"}
        shape = {"queries": self.queries, "width": self.width, "max_tokens": self.service.engine.max_tokens}
        draws = {"reconstructs": not self.painter.unavailable_reason}
        return JSONResponse({"object": "list", "data": [{**entry, **shape, **draws}]})

    async def page(self, _) -> Response:
        return HTMLResponse(PAGE, headers=HEADERS)

    def _check_model(self, body: dict) -> None:
        if body.get("model") not in (None, self.model):
            raise ApiError(404, "model_not_found", f"there is no such model here; there is {self.model}")
