"""Captions for single requests: decode processes, an encoder that takes what waits, and the language model.

    service = Service(checkpoint, make_engine, ServiceConfig())
    await service.start()                          # captions come once `ready`
    embeds = await service.embed(content)          # an image file -> [queries, llm_width]
    completion = await service.caption(embeds, Sampling())

A language model that dies is started again; until then `ready` is false and requests are refused."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from serve.core.decode import DecodeError, DecodePool, default_workers
from serve.core.inputs import Item
from serve.core.pipeline import open_encoder
from serve.engines.base import Completion, EmbedsError, EngineError, LLMEngine, Sampling
from serve.http.auth import ApiError
from serve.http.metrics import Metrics
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import ImageError

RESTARTS = 3  # in a row without a caption between them: then the server gives up
WATCH = 0.5  # seconds between looks at the engine


@dataclass(frozen=True)
class ServiceConfig:
    """What bounds the stages."""

    batch: int = 32  # images the encoder takes at once
    workers: int | None = None  # decode processes; None: default_workers()
    max_pixels: int = 50_000_000  # of a picture, as its header announces it
    encoder: str = "torch"  # a word of export.runtimes.factory
    artifacts: Path | None = None  # folder of the exported encoder, for all but torch


class Service:
    """The stages around one engine, for any number of requests on one event loop."""

    def __init__(
        self, checkpoint: Checkpoint, make_engine: Callable[[], LLMEngine], config: ServiceConfig, metrics=None
    ):
        self.checkpoint, self.config, self.metrics = checkpoint, config, metrics or Metrics()
        self._make, self.engine = make_engine, make_engine()
        self.ready, self.failure = False, asyncio.get_running_loop().create_future()
        self._encoding = ThreadPoolExecutor(1, "encoder")
        self._crops: asyncio.Queue[tuple[int, asyncio.Future]] = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []
        self._writing, self._restarts, self._room = 0, 0, asyncio.Event()
        self._room.set()
        self.metrics.watch("ready", lambda: self.ready)
        self.metrics.watch("encoder_queue", self._crops.qsize)
        self.metrics.watch("llm_requests", lambda: self._writing)

    async def start(self) -> None:
        """Begin to load. `failure` is set to what ends the service for good."""
        workers = self.config.workers or default_workers()
        size, slots = self.checkpoint.config.image_size, 2 * self.config.batch + workers
        self._pool = DecodePool(size, workers, slots, self.config.max_pixels)
        await self._pool.__aenter__()
        self._tasks = [asyncio.create_task(self._guarded(part)) for part in (self._encode, self._keep_engine)]

    async def close(self) -> None:
        """End the processes."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.__aexit__()
        await self.engine.close()

    async def _guarded(self, part: Callable) -> None:
        try:
            await part()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.ready = False
        if not self.failure.done():
            self.failure.set_exception(error)

    async def crop(self, content: bytes):
        """An image file's pixels as the encoder takes them: uint8 [3, S, S]. Raises ApiError."""
        slot = await self._slot(content)
        crop = self._pool.crops[slot].copy()
        self._pool.release(slot)
        return crop

    async def embed(self, content: bytes):
        """An image file's prompt embeddings [queries, llm_width]. Raises ApiError."""
        slot = await self._slot(content)
        answer = asyncio.get_running_loop().create_future()
        self._crops.put_nowait((slot, answer))
        with self.metrics.stage("encode"):
            return await answer

    async def _slot(self, content: bytes) -> int:
        """Decode into a slot of the pool. Raises ApiError."""
        with self.metrics.stage("decode"):
            decoding = asyncio.create_task(self._decode(content, await self._pool.slot()))
            try:
                return await asyncio.shield(decoding)
            except asyncio.CancelledError:  # the process writes into the slot until it answers
                decoding.add_done_callback(self._release_late)
                raise

    async def _decode(self, content: bytes, slot: int) -> int:
        memory = os.memfd_create("image")  # the process reads it there: a pipe would make us wait for its reader
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(content)
            await self._pool.decode(Item("request", f"/proc/{os.getpid()}/fd/{memory}"), slot)
        except ImageError as error:
            self._pool.release(slot)
            self.metrics.images.labels(error.kind).inc()
            raise ApiError(400, "image", f"the image cannot be used: {error}") from error
        except DecodeError as error:
            self._pool.release(slot)
            self._give_up(error)
            raise ApiError(503, "decode", "images cannot be decoded any more: the server ends", 30) from error
        except BaseException:
            self._pool.release(slot)
            raise
        finally:
            os.close(memory)
        return slot

    def _release_late(self, decoding: asyncio.Task) -> None:
        if not decoding.cancelled() and decoding.exception() is None:
            self._pool.release(decoding.result())

    async def _encode(self) -> None:
        """Encode what waits. While the language model has more than it takes at once, let a whole batch gather."""
        loop = asyncio.get_running_loop()
        choice = (self.config.encoder, self.config.artifacts, self.engine.encoder_threads)
        encoder = await loop.run_in_executor(self._encoding, open_encoder, self.checkpoint, *choice)
        while True:
            batch = [await self._crops.get()]
            await self._room.wait()
            while len(batch) < self.config.batch and not self._crops.empty():
                batch.append(self._crops.get_nowait())
            wanted = [(slot, answer) for slot, answer in batch if not answer.done()]  # the others' clients have left
            crops = self._pool.crops[[slot for slot, _ in wanted]]  # a copy
            for slot, _ in batch:
                self._pool.release(slot)
            if not wanted:
                continue
            rows = await loop.run_in_executor(self._encoding, encoder, crops)
            for (_, answer), row in zip(wanted, rows, strict=True):
                if not answer.done():  # nobody waits for it any more
                    answer.set_result(row.clone())

    async def caption(self, embeds, sampling: Sampling) -> Completion:
        """Continue embeddings. Raises ApiError; cancelling it cancels the request in the engine."""
        async with self._writes():
            completion = await self.engine.generate(embeds, sampling)
        self.metrics.tokens.inc(len(completion.token_ids))
        return completion

    async def stream(self, embeds, sampling: Sampling) -> AsyncGenerator[Completion]:
        """As `caption`, in pieces."""
        async with self._writes(), aclosing(self.engine.stream(embeds, sampling)) as pieces:
            async for piece in pieces:
                self.metrics.tokens.inc(len(piece.token_ids))
                yield piece

    @asynccontextmanager
    async def _writes(self):
        self.check_ready()
        engine = self.engine
        self._write(1)
        try:
            with self.metrics.stage("llm"):
                yield
            self._restarts = 0
            self.metrics.images.labels("captioned").inc()
        except EmbedsError as error:
            self.metrics.images.labels("encoder").inc()
            raise ApiError(400, "image", f"the image cannot be captioned: {error}") from error
        except EngineError as error:
            self.ready = self.ready and await self.engine.healthy()
            told = "did not answer" if engine.alive else "has died and is being started again"
            raise ApiError(503, "engine", f"the language model {told}", 30) from error
        finally:
            self._write(-1)

    def _write(self, more: int) -> None:
        self._writing += more
        (self._room.set if self._writing <= self.engine.in_flight else self._room.clear)()

    def check_ready(self) -> None:
        """Raise ApiError 503 while no captions can be written."""
        if not self.ready:
            raise ApiError(503, "not_ready", "the models are being loaded, or do not answer", 10)

    async def _keep_engine(self) -> None:
        """Start the engine, and again whenever it has died."""
        await self.engine.start()
        while True:
            self.ready = True
            while self.engine.alive:
                await asyncio.sleep(WATCH)
                self.ready = self.ready or await self.engine.healthy()
            self.ready = False
            self._restarts += 1
            if self._restarts > RESTARTS:
                raise EngineError(f"the language model has died {RESTARTS + 1} times without a caption in between")
            print("the language model has died: it is started again", file=sys.stderr, flush=True)
            self.metrics.restarts.inc()
            await self.engine.close()
            self.engine = self._make()
            await self.engine.start()
