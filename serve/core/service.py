"""The captioning service: decode -> batch -> encode -> generate, for any number of images on one event loop.

    service = CaptionService(checkpoint, make_engine, ServiceConfig())
    await service.start()                                        # returns at once; the models load in the background
    encoded = await service.encode(item)                         # an Item or the content of an image file
    generated = await service.captions(encoded.embeds, [Sampling()])
    await service.close()

The batch command (serve/core/run.py) and the HTTP server (serve/http/service.py) are adapters over it; the stages on
Ray (serve/ray/stages.py) run its parts in processes of their own. Two bounds hold the memory: an image that is decoded
occupies a slot of the decode pool until the encoder has taken it, and the batcher limits how many embeddings wait for
the language model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from serve.core.batcher import Batcher, Encoded, Encoder, PassCrops
from serve.core.decode import DecodeError, DecodePool, default_workers
from serve.core.inputs import Item
from serve.engines.base import Completion, EngineError, LLMEngine, Sampling
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import say

WATCH = 0.5  # seconds between two checks of the engine


@dataclass(frozen=True)
class ServiceConfig:
    """The limits of the stages."""

    batch: int = 32  # images that the encoder takes at once
    workers: int | None = None  # decode processes; None: default_workers()
    max_pixels: int = 50_000_000  # of an image, as its header announces them
    encoder: str = "torch"  # a runtime of export.runtimes
    artifacts: Path | None = None  # folder of the exported encoder, for all but torch
    ignore_icc: bool = False  # take colours as they are stored, as published
    precision: str | None = None  # of the encoder in torch
    cuda_graphs: bool = True  # for the encoder in torch on a GPU
    fast_jpeg: bool = False  # decode large JPEG files at a part of their size
    restarts: int = 3  # of an engine that dies, in a row without a caption between them; then the service fails


@dataclass(frozen=True)
class Generated:
    """The captions of one image, and the seconds that the language model took for them."""

    completions: list[Completion]
    seconds: float


class CaptionService:
    """The stages around one language-model engine.

    `failure` is a future that gets the exception which ends the service for good. `ready` is True while captions can
    be written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        make_engine: Callable[[], LLMEngine],
        config: ServiceConfig,
        timeline: Timeline | None = None,
    ):
        """`timeline` records when each stage worked."""
        self.checkpoint = checkpoint
        self.config = config
        self.engine = make_engine()
        self.failure = asyncio.get_running_loop().create_future()
        self.workers = config.workers or default_workers()
        slots = 2 * config.batch + self.workers
        decoding = config.max_pixels, config.ignore_icc, config.fast_jpeg
        self.pool = DecodePool(checkpoint.config.image_size, self.workers, slots, *decoding)
        self.batcher = Batcher(self.pool, self._open_encoder, self.engine.in_flight, timeline)
        self._make_engine = make_engine
        self._timeline = timeline
        self._ready = asyncio.Event()
        self._deaths = 0  # of the engine, since the last caption
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Start the decode processes, and begin to load the encoder and the language model."""
        for note in self.engine.notes:
            say(note)
        await self.pool.__aenter__()
        self._tasks = [asyncio.create_task(self._guarded(part)) for part in (self._encode_batches, self._keep_engine)]

    async def close(self) -> None:
        """End the tasks and processes."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.__aexit__()
        await self.engine.close()

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @ready.setter
    def ready(self, value: bool) -> None:
        (self._ready.set if value else self._ready.clear)()

    def _open_encoder(self) -> Encoder | PassCrops:
        config = self.config
        if self.engine.takes_crops:
            return PassCrops(config.batch)
        return Encoder(
            self.checkpoint,
            config.encoder,
            config.artifacts,
            config.batch,
            self.engine.encoder_threads,
            config.precision,
            config.cuda_graphs,
        )

    async def _encode_batches(self) -> None:
        if self.engine.loads_alone:
            await self._ready.wait()
        await self.batcher.run()

    async def _guarded(self, part: Callable) -> None:
        try:
            await part()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.ready = False
        if not self.failure.done():
            self.failure.set_exception(error)

    async def decode(self, source: Item | bytes, slot: int | None = None, crop: str = "center") -> int:
        """Decode an image into a slot of the pool and return the slot; the caller encodes or releases it.

        `slot`: one that `pool.slot()` has reserved; `crop`: one of `vlv.data.decoding.crop.CROPS`. Raises ImageError,
        or DecodeError if no image can be decoded.
        """
        slot = await self.pool.slot() if slot is None else slot
        decoding = asyncio.create_task(self._decode(source, slot, crop))
        try:
            await asyncio.shield(decoding)
        except asyncio.CancelledError:  # the process writes into the slot until it answers
            decoding.add_done_callback(lambda task: self._release_decoded(task, slot))
            raise
        return slot

    async def _decode(self, source: Item | bytes, slot: int, crop: str) -> None:
        try:
            with contextlib.nullcontext(source) if isinstance(source, Item) else _in_memory(source) as item:
                start, end = await self.pool.decode(item, slot, crop)
        except BaseException as error:
            self.pool.release(slot)
            if isinstance(error, DecodeError):
                self._fail(error)
            raise
        if self._timeline:
            self._timeline.span("decoding", start, end)

    def _release_decoded(self, decoding: asyncio.Task, slot: int) -> None:
        if not decoding.cancelled() and decoding.exception() is None:
            self.pool.release(slot)

    async def encode(self, source: Item | bytes, slot: int | None = None, crop: str = "center") -> Encoded:
        """Decode and encode an image. Arguments and errors as for `decode`."""
        return await self.batcher.encode(await self.decode(source, slot, crop))

    async def captions(self, embeds: Tensor, samplings: Sequence[Sampling], wait: bool = False) -> Generated:
        """Continue an image's embeddings [queries, llm_width] once for every sampling.

        Cancelling it cancels the requests in the engine. `wait`: until the language model is loaded. Raises
        EngineError, also if it is not loaded; EmbedsError.
        """
        async with self._writing(len(samplings), wait):
            start = time.monotonic()
            if len(samplings) == 1:
                completions = [await self.engine.generate(embeds, samplings[0])]
            else:
                completions = await asyncio.gather(*(self.engine.generate(embeds, s) for s in samplings))
            seconds = time.monotonic() - start
        if self._timeline:
            self._timeline.span("the language model", start, tokens=sum(len(c.token_ids) for c in completions))
        return Generated(completions, seconds)

    async def caption_squares(
        self, squares: Tensor, samplings: Sequence[Sampling], wait: bool = False
    ) -> list[Generated]:
        """Continue the embeddings of an image's squares [N, queries, llm_width], as `captions` does each.

        Of several squares, each has the seconds of all.
        """
        if len(squares) == 1:
            return [await self.captions(squares[0], samplings, wait)]
        start = time.monotonic()
        generated = await asyncio.gather(*(self.captions(square, samplings, wait) for square in squares))
        seconds = time.monotonic() - start
        return [Generated(one.completions, seconds) for one in generated]

    async def stream(self, embeds: Tensor, sampling: Sampling) -> AsyncGenerator[Completion]:
        """Continue embeddings once, and yield the pieces as they come. Raises EngineError, EmbedsError."""
        async with self._writing(1), aclosing(self.engine.stream(embeds, sampling)) as pieces:
            async for piece in pieces:
                yield piece

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        """Continue embeddings once, and yield new token ids as `LLMEngine.tokens`. Raises EngineError, EmbedsError."""
        async with self._writing(1), aclosing(self.engine.tokens(embeds, sampling, every)) as steps:
            async for ids in steps:
                yield ids

    @asynccontextmanager
    async def _writing(self, captions: int, wait: bool = False):
        self.batcher.count_captions(captions)
        try:
            if wait:
                await self._ready.wait()
            elif not self.ready:
                raise EngineError("the language model is not loaded")
            yield
            self._deaths = 0
        except EngineError:
            self.ready = self.ready and await self.engine.healthy()
            raise
        finally:
            self.batcher.count_captions(-captions)

    async def _keep_engine(self) -> None:
        """Start the engine, and again whenever it has died."""
        start = time.monotonic()
        await self.engine.start()
        if self._timeline:
            self._timeline.span("loading", start, name="language model")
            self._timeline.window = time.monotonic()
        self.ready = True
        while self.config.restarts:
            while self.engine.alive:
                await asyncio.sleep(WATCH)
                self.ready = self.ready or await self.engine.healthy()
            self.ready = False
            self._deaths += 1
            if self._deaths > self.config.restarts:
                raise EngineError(f"the language model has died {self._deaths} times without a caption in between")
            print("the language model has died: it is started again", file=sys.stderr, flush=True)
            self.restarted()
            await self.engine.close()
            self.engine = self._make_engine()
            await self.engine.start()
            self.ready = True

    def restarted(self) -> None:
        """Count a restart of the engine; for subclasses with metrics."""


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[Item]:
    """Yield an item whose content is in memory: a decode process reads it there, without a pipe that blocks us."""
    memory = os.memfd_create("image")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(content)
        yield Item("request", f"/proc/{os.getpid()}/fd/{memory}")
    finally:
        os.close(memory)
