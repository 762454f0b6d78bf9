"""The batch command's adapter over the captioning service: items in, records in a sink, progress on stderr.

    items --(slots)--> decode --> batch --> encode --> generate --> record --> sink

Only a listing's part is held in memory, whatever the input: an image becomes a task once a slot of the decode pool is
free for it. The models load while the first images are already being decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from serve.core.id_set import IdSet
from serve.core.inputs import Item, hash_of, stamp_of
from serve.core.record import PLAIN, caption_record, crop_fields, error_record, joined
from serve.core.service import CaptionService, ServiceConfig
from serve.core.style import CaptionStyle
from serve.engines.base import EmbedsError, LLMEngine, Sampling
from serve.outputs.jsonl import alias
from serve.reports.progress import Progress
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import MAX_PIXELS, ImageError

LISTED = 64  # items that are read from the listing at a time
Listed = tuple[Item, dict]  # an item, and the fields of its record that tell a later run whether the file has changed


@dataclass(frozen=True)
class RunConfig:
    """What a run does with every image, and the limits of its stages."""

    sampling: Sampling
    prompt_batch: int = 32  # images that the encoder takes at once
    workers: int | None = None  # decode processes; None: default_workers()
    limit: int | None = None  # only the first images of the input
    raw: bool = False  # captions as the model wrote them, without the clean-up
    captions: int = 1  # drawn for each image; equal ones count once
    encoder: str = "torch"  # a runtime of export.runtimes
    artifacts: Path | None = None  # folder of the exported encoder, for all but torch
    flags: str = ""  # for the records: what changes captions beside the model
    style: CaptionStyle = PLAIN  # how captions are edited
    ignore_icc: bool = False  # take colours as they are stored, as published
    precision: str | None = None  # of the encoder in torch
    cuda_graphs: bool = True  # for the encoder in torch on a GPU
    crop: str = "center"  # what the model sees of an image: one of vlv.data.decoding.crop.CROPS
    verify: bool = False  # record the hashes of the files
    fast_jpeg: bool = False  # decode large JPEG files at a part of their size


class CaptionRun:
    """One run over `items`: every image becomes a caption or an error in the sink."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: LLMEngine,
        sink,
        config: RunConfig,
        progress: Progress,
        timeline: Timeline | None = None,
    ):
        """`timeline` gets the times of the stages, from which it tells what the run was waiting for."""
        self.checkpoint = checkpoint
        self.engine = engine
        self.sink = sink
        self.config = config
        self.progress = progress
        self.timeline = timeline or Timeline()
        self.model_id = engine.options.model_id(checkpoint.hash)
        self.listed = IdSet()  # keys and aliases of the images of the input
        self.complete = False  # the input was listed to its end
        # a thread of its own: asyncio would wait for its default ones, even at the end of a cancelled run
        self._listing = ThreadPoolExecutor(1, "listing")

    async def run(self, items: Iterable[Item]) -> None:
        """Caption what the sink has not finished. Raises SinkError, EngineError, CheckpointError, SourceError."""
        loop = asyncio.get_running_loop()
        new = self._new(items)
        head = await loop.run_in_executor(self._listing, _take, new)
        if not head:
            return
        config = self.config
        limits = ServiceConfig(
            config.prompt_batch,
            config.workers,
            MAX_PIXELS,
            config.encoder,
            config.artifacts,
            config.ignore_icc,
            config.precision,
            config.cuda_graphs,
            config.fast_jpeg,
            restarts=0,
        )
        self._service = service = CaptionService(self.checkpoint, lambda: self.engine, limits, self.timeline)
        images = -(-self.engine.in_flight // config.captions)  # whose captions are decoded together
        self.timeline.places.update({"decoding": service.workers, "the encoder": 1, "the language model": images})
        await service.start()
        try:
            async with asyncio.TaskGroup() as background:
                others = [background.create_task(self._show_progress()), background.create_task(self._fail())]
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._feed(head, new, tasks))
                for task in others:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            await service.close()

    def _new(self, items: Iterable[Item]) -> Iterator[Listed]:
        """Yield the items that are not finished, with what tells their files from others, before they are read."""
        for item in itertools.islice(items, self.config.limit):
            size, modified = stamp_of(item.path) or (None, None)
            if not self.listed.add(item.key):
                self.progress.repeated += 1
                continue
            self.listed.add(alias(item.id, size))
            if self.sink.is_finished(item, size):
                self.progress.skipped += 1
            else:
                digest = {"sha256": hash_of(item.path)} if self.config.verify else {}
                yield item, {"bytes": size, "mtime_ns": modified, **digest}
        self.complete = self.config.limit is None

    async def _show_progress(self) -> None:
        while True:
            self.progress.show(self.progress.line())
            await asyncio.sleep(0.5 if sys.stderr.isatty() else 10)

    async def _fail(self) -> None:
        """Raise what ends the service for good."""
        await asyncio.shield(self._service.failure)

    async def _feed(self, head: list[Listed], rest: Iterator[Listed], tasks: asyncio.TaskGroup) -> None:
        """Start a task for every item, as slots become free."""
        loop = asyncio.get_running_loop()
        while head:
            for item, of_file in head:
                tasks.create_task(self._caption(item, of_file, await self._service.pool.slot()))
            head = await loop.run_in_executor(self._listing, _take, rest)  # listing may wait for a slow disk

    async def _caption(self, item: Item, of_file: dict, slot: int) -> None:
        samplings = [self._sampling(item).draw(number) for number in range(self.config.captions)]
        config = self.config
        try:
            encoded = await self._service.encode(item, slot, config.crop)
            generated = await self._service.caption_squares(encoded.squares, samplings, wait=True)
            timings = {"encode": encoded.seconds, "llm": generated[0].seconds}
            squares = [square.completions for square in generated]
            completions = [joined(draw, config.raw) for draw in zip(*squares, strict=True)]
            crop = crop_fields(config.crop, encoded.boxes, squares, config.raw)
            record = caption_record(
                item, completions, config.raw, self.model_id, config.flags, config.style, timings, crop
            )
            self.sink.caption(record | of_file, item)
        except (ImageError, EmbedsError) as error:
            kind = error.kind if isinstance(error, ImageError) else "encoder"
            self.sink.error(error_record(item, kind, str(error)) | of_file)
            self.progress.failed += 1
        else:
            self.progress.caption()

    def _sampling(self, item: Item) -> Sampling:
        """Return the sampling of an image: its seed depends on the image alone, not on what else is captioned."""
        key = f"{self.config.sampling.seed}:{item.id}".encode("utf-8", "surrogateescape")
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
        return replace(self.config.sampling, seed=seed)


def _take(items: Iterator[Listed]) -> list[Listed]:
    return list(itertools.islice(items, LISTED))


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
