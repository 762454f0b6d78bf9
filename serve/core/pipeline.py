"""The main road: decode processes -> encoder batches in a thread -> language model -> sink.

    items --(slots)--> DecodePool --> decoded --(permits)--> encoder --> engine --> sink

Two bounds hold the memory, whatever the input: a crop occupies one of the pool's slots until the
encoder has taken it, and an image holds one of `permits` from its encoding to its record. The models
load while the first images are already being decoded. No stage waits for another but through these
bounds, so the slowest sets the pace and the others' batches fill up.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from serve.core.decode import DecodePool, default_workers
from serve.core.inputs import Item
from serve.engines.base import EmbedsError, LLMEngine, Sampling
from serve.reports.progress import Progress
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import ImageError

LISTED = 64  # items read from the listing at a time


@dataclass(frozen=True)
class PipelineConfig:
    """What bounds and shapes a run."""

    sampling: Sampling
    prompt_batch: int = 32  # images the encoder takes at once
    workers: int | None = None  # decode processes; None: default_workers()
    limit: int | None = None  # only the first images of the input
    raw: bool = False  # captions as the model wrote them, without the clean-up
    captions: int = 1  # drawn for each image; what is drawn twice counts once
    encoder: str = "torch"  # a word of export.runtimes.factory
    artifacts: Path | None = None  # folder of the exported encoder, for all but torch


class TorchEncoder:
    """Crops to prompt embeddings with PyTorch, on the GPU where there is one."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None):
        """Load the weights; `threads` as LLMEngine.encoder_threads. Raises CheckpointError."""
        import torch

        if threads:
            torch.set_num_threads(threads)  # of the thread that calls, which encodes too
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self._encoder = checkpoint.load_encoder(dtype).to(device)

    def __call__(self, crops):
        """uint8 array [B, 3, S, S] -> tensor [B, queries, llm_width] on the CPU."""
        import torch

        pixels, device = torch.from_numpy(crops), self._encoder.device
        if device.type == "cuda":  # from pinned memory, the copy does not hold up this thread
            pixels = pixels.pin_memory()
        with torch.inference_mode():
            return self._encoder(pixels.to(device, non_blocking=True)).cpu()


class ArtifactEncoder:
    """The same from an exported encoder, with one of export.runtimes.factory's runtimes."""

    def __init__(self, checkpoint: Checkpoint, word: str, artifacts: Path | None):
        """Check the artifact and load it. Raises ArtifactError."""
        from export.runtimes.factory import open_runtime

        self._engine = open_runtime(word, artifacts, checkpoint)
        self._most = self._engine.max_batch  # loads it

    def __call__(self, crops):
        """uint8 array [B, 3, S, S] -> tensor [B, queries, llm_width] on the CPU; B may be above the graph's most."""
        import torch

        parts = torch.from_numpy(crops).split(self._most)
        return torch.cat([self._engine.encode(part).cpu() for part in parts])


def open_encoder(checkpoint: Checkpoint, word: str, artifacts: Path | None, threads: int | None = None):
    """The encoder of a word of RUNTIMES, made in the thread that calls it; `threads` for PyTorch's."""
    if word == "torch":
        return TorchEncoder(checkpoint, threads)
    return ArtifactEncoder(checkpoint, word, artifacts)


class Pipeline:
    """One run over `items`: every image ends as a caption or as an error in the sink."""

    def __init__(
        self, checkpoint: Checkpoint, engine: LLMEngine, sink, config: PipelineConfig, progress: Progress, timeline=None
    ):
        """`timeline`: where the stages' times go, for what the run was waiting for."""
        self.checkpoint, self.engine, self.sink = checkpoint, engine, sink
        self.config, self.progress, self.timeline = config, progress, timeline or Timeline()
        self.model = engine.options.mark(checkpoint.hash)
        # threads of their own: asyncio would wait for its default ones, at the end even of a cancelled run
        self._listing, self._encoding = ThreadPoolExecutor(1, "listing"), ThreadPoolExecutor(1, "encoder")

    async def run(self, items: Iterable[Item]) -> None:
        """Caption what the sink has not finished. Raises SinkError, EngineError, CheckpointError, SourceError."""
        loop = asyncio.get_running_loop()
        new = self._new(items)
        head = await loop.run_in_executor(self._listing, _take, new)
        if not head:
            return
        batch = self.config.prompt_batch
        workers = self.config.workers or default_workers()
        at_once = -(-self.engine.in_flight // self.config.captions)  # images whose captions are written together
        self.timeline.places.update({"decoding": workers, "the encoder": 1, "the language model": at_once})
        self._decoded: asyncio.Queue[tuple[Item, int] | None] = asyncio.Queue()
        # a batch more than the engine decodes together: it never starves while the next one is being encoded
        self._permits = asyncio.Semaphore(at_once + batch)
        self._ready = asyncio.Event()
        try:
            async with (
                DecodePool(self.checkpoint.config.image_size, workers, 2 * batch + workers) as self._pool,
                asyncio.TaskGroup() as background,
            ):
                boot = background.create_task(self._boot())
                ticker = background.create_task(self._tick())
                async with asyncio.TaskGroup() as self._tasks:
                    self._tasks.create_task(self._feed(head, new))
                    self._tasks.create_task(self._encode())
                ticker.cancel()
                boot.cancel()  # still loading where no image needed it
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            await self.engine.close()

    def _new(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in itertools.islice(items, self.config.limit):
            if self.sink.finished.add(item.id):
                yield item
            else:
                self.progress.skipped += 1

    async def _boot(self) -> None:
        start = time.monotonic()
        await self.engine.start()
        self.timeline.span("loading", start, name="language model")
        self.timeline.window = time.monotonic()
        self._ready.set()

    async def _tick(self) -> None:
        while True:
            self.progress.show(self.progress.line())
            await asyncio.sleep(0.5 if sys.stderr.isatty() else 10)

    async def _feed(self, head: list[Item], rest: Iterator[Item]) -> None:
        """Decode everything, as slots become free; then mark the end of the queue."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as decoding:
            while head:
                for item in head:
                    slot = await self._pool.slot()
                    decoding.create_task(self._decode(item, slot))
                head = await loop.run_in_executor(self._listing, _take, rest)  # listing may wait for a slow disk
        self._decoded.put_nowait(None)

    async def _decode(self, item: Item, slot: int) -> None:
        try:
            start, end = await self._pool.decode(item, slot)
        except ImageError as error:
            self._pool.release(slot)
            self._fail(item, error.kind, error)
        else:
            self.timeline.span("decoding", start, end)
            self._decoded.put_nowait((item, slot))

    async def _encode(self) -> None:
        """Encode what is decoded, at most a batch at once and less where no more is there."""
        loop = asyncio.get_running_loop()
        choice = (self.config.encoder, self.config.artifacts, self.engine.encoder_threads)
        encoder = await loop.run_in_executor(self._encoding, open_encoder, self.checkpoint, *choice)
        more = True
        while more:
            for _ in range(self.config.prompt_batch):
                await self._permits.acquire()
            batch = [await self._decoded.get()]
            while len(batch) < self.config.prompt_batch and not self._decoded.empty():
                batch.append(self._decoded.get_nowait())
            if batch[-1] is None:
                batch.pop()
                more = False
            for _ in range(self.config.prompt_batch - len(batch)):
                self._permits.release()
            if not batch:
                continue
            items, slots = zip(*batch, strict=True)
            crops = self._pool.crops[list(slots)]  # a copy
            for slot in slots:
                self._pool.release(slot)
            start = time.monotonic()
            embeds = await loop.run_in_executor(self._encoding, encoder, crops)
            seconds = time.monotonic() - start
            self.timeline.span("the encoder", start, images=len(items), waiting=self._decoded.qsize())
            for item, row in zip(items, embeds, strict=True):
                # cloned: a view would keep its whole batch in memory until the last of it is captioned
                self._tasks.create_task(self._caption(item, row.clone(), seconds))

    async def _caption(self, item: Item, embeds, encode_seconds: float) -> None:
        from vlv.model.captioner import clean_caption  # imports torch, which is there by now

        await self._ready.wait()
        start = time.monotonic()
        draws = (self.engine.generate(embeds, self._sampling(item, i)) for i in range(self.config.captions))
        try:
            completions = await asyncio.gather(*draws)
        except EmbedsError as error:
            self._fail(item, "encoder", error)
        else:
            texts = [c.text if self.config.raw else clean_caption(c.text) for c in completions]
            record = {
                "id": item.id,
                "path": item.path,
                "caption": texts[0],
                **({"captions": list(dict.fromkeys(texts))} if len(texts) > 1 else {}),
                "tokens": sum(len(c.token_ids) for c in completions),
                "finish_reason": completions[0].finish_reason,
                "timings": {"encode": round(encode_seconds, 4), "llm": round(time.monotonic() - start, 4)},
                "model": self.model,
            }
            self.timeline.span("the language model", start, tokens=record["tokens"])
            try:
                self.sink.caption(record, item)
                self.progress.caption()
            except ImageError as error:
                self._fail(item, error.kind, error)
        self._permits.release()

    def _sampling(self, item: Item, draw: int) -> Sampling:
        """Each image draws from a seed of its own, so that its caption does not depend on what else is captioned."""
        key = f"{self.config.sampling.seed + draw}:{item.id}".encode("utf-8", "surrogateescape")
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
        return replace(self.config.sampling, seed=seed)

    def _fail(self, item: Item, kind: str, error: Exception) -> None:
        self.sink.error({"id": item.id, "path": item.path, "kind": kind, "error": str(error)})
        self.progress.failed += 1


def _take(items: Iterator[Item]) -> list[Item]:
    return list(itertools.islice(items, LISTED))


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
