"""The captioning service behind HTTP: errors become responses, and Prometheus counts what happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

from serve.core.batcher import Encoded
from serve.core.decode import DecodeError
from serve.core.service import CaptionService, ServiceConfig
from serve.engines.base import Completion, EmbedsError, EngineError, LLMEngine, Sampling
from serve.http.errors import ApiError
from serve.http.metrics import Metrics
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import ImageError


class Service(CaptionService):
    """Embeddings and captions for requests; every error is an ApiError."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        make_engine: Callable[[], LLMEngine],
        config: ServiceConfig,
        metrics: Metrics | None = None,
    ):
        super().__init__(checkpoint, make_engine, config)
        self.metrics = metrics or Metrics()
        self.metrics.watch("ready", lambda: self.ready)
        self.metrics.watch("encoder_queue", lambda: self.batcher.waiting)
        self.metrics.watch("llm_requests", lambda: self.batcher.captions)

    async def crop(self, content: bytes, crop: str = "center"):
        """Return an image file's pixels as the encoder takes them, uint8 [3, S, S]. Raises ApiError."""
        slot = await self._decoded(content, crop)
        crop = self.pool.crops[slot].copy()
        self.pool.release(slot)
        return crop

    async def embed(self, content: bytes, crop: str = "center"):
        """Return an image file's prompt embeddings [queries, llm_width], of its first square. Raises ApiError."""
        return (await self.encoded(content, crop)).embeds

    async def encoded(self, content: bytes, crop: str) -> Encoded:
        """Encode the squares of an image file; `crop` as for `vlv.data.image.load_crops`. Raises ApiError."""
        slot = await self._decoded(content, crop)
        with self.metrics.stage("encode"):
            return await self.batcher.encode(slot)

    async def _decoded(self, content: bytes, crop: str) -> int:
        try:
            with self.metrics.stage("decode"):
                return await self.decode(content, crop=crop)
        except ImageError as error:
            self.metrics.images.labels(error.kind).inc()
            raise ApiError(400, "image", f"the image cannot be used: {error}") from error
        except DecodeError as error:
            raise ApiError(503, "decode", "images cannot be decoded any more: the server ends", 30) from error

    async def caption(self, embeds, sampling: Sampling) -> Completion:
        """Continue embeddings. Raises ApiError; cancelling it cancels the request in the engine."""
        self.check_ready()
        with self._counted():
            (completion,) = (await self.captions(embeds, [sampling])).completions
        self.metrics.tokens.inc(len(completion.token_ids))
        return completion

    async def stream(self, embeds, sampling: Sampling) -> AsyncGenerator[Completion]:
        """Continue embeddings and yield the pieces as they come. Raises ApiError."""
        self.check_ready()
        with self._counted():
            async with aclosing(super().stream(embeds, sampling)) as pieces:
                async for piece in pieces:
                    self.metrics.tokens.inc(len(piece.token_ids))
                    yield piece

    async def tokens(self, embeds, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        """Continue embeddings and yield new token ids. Raises ApiError."""
        self.check_ready()
        with self._counted():
            async with aclosing(super().tokens(embeds, sampling, every)) as steps:
                async for ids in steps:
                    self.metrics.tokens.inc(len(ids))
                    yield ids

    @contextmanager
    def _counted(self) -> Iterator[None]:
        engine = self.engine
        try:
            with self.metrics.stage("llm"):
                yield
            self.metrics.images.labels("captioned").inc()
        except EmbedsError as error:
            self.metrics.images.labels("encoder").inc()
            raise ApiError(400, "image", f"the image cannot be captioned: {error}") from error
        except EngineError as error:
            what = "did not answer" if engine.alive else "has died and is being started again"
            raise ApiError(503, "engine", f"the language model {what}", 30) from error

    def check_ready(self) -> None:
        """Raise ApiError 503 while no captions can be written."""
        if not self.ready:
            raise ApiError(503, "not_ready", "the models are being loaded, or do not answer", 10)

    def restarted(self) -> None:
        self.metrics.restarts.inc()
