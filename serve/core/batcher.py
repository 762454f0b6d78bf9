"""Collect decoded images into encoder batches: the one place that decides the batch size.

The rule: whenever the encoder is free, it takes all images that wait, at most `Encoder.batch`. While the language
model has more captions to write than it decodes together (`in_flight`, and a sixteenth more, which takes the places of
those that end while the next batch is encoded), the encoder waits and a full batch gathers; more embeddings would only
wait in memory. At most so many captions and one batch of images are open at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.runtimes.factory import open_runtime
from serve.core.decode import DecodePool
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint
from vlv.data.decoding.crop import Box


class Encoder:
    """Encode arrays of images of any length with a runtime of export.runtimes, `batch` images at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: str = "torch",
        artifacts: Path | None = None,
        batch: int = 32,
        threads: int | None = None,
        precision: str | None = None,
        cuda_graphs: bool = True,
    ):
        """Load the weights. `threads`: of a CPU, for PyTorch in the thread that calls, which has to encode too.

        precision, cuda_graphs: of the runtime torch. Raises ArtifactError or CheckpointError.
        """
        if threads:
            torch.set_num_threads(threads)
        self._runtime = open_runtime(runtime, artifacts, checkpoint, precision, batch if cuda_graphs else 0)
        self._runtime.threads = threads
        self._runtime.session("encoder")  # loads it
        self._stream = contextlib.nullcontext()
        if self._runtime.device.type == "cuda":
            # beside vLLM inline, whose stream has a higher priority, the encoder fills what vLLM leaves free
            torch.cuda.synchronize()  # the weights were copied by the default stream
            self._stream = torch.cuda.stream(torch.cuda.Stream())
        self.batch = min(batch, self._runtime.max_batch or batch)

    def __call__(self, images: np.ndarray) -> Tensor:
        """Encode uint8 [B, 3, S, S] to prompt embeddings, float32 [B, queries, llm_width] on the CPU."""
        with self._stream:
            return torch.cat([self._encode(part) for part in torch.from_numpy(images).split(self.batch)])

    def _encode(self, images: Tensor) -> Tensor:
        if self._runtime.device.type == "cuda":  # from pinned memory, the copy does not block this thread
            images = images.pin_memory().to(self._runtime.device, non_blocking=True)
        return self._runtime.encode(images).cpu()


class PassCrops:
    """Stand in for the encoder where it runs in the engine: pass the crops on, `batch` at a time."""

    def __init__(self, batch: int):
        self.batch = batch

    def __call__(self, images: np.ndarray) -> Tensor:
        """Return the images uint8 [B, 3, S, S]."""
        return torch.from_numpy(images)


@dataclass(frozen=True)
class Encoded:
    """The prompt embeddings of one image's squares, and the seconds that its batch took.

    Where the encoder runs in the engine, the squares themselves: uint8 [N, 3, S, S].
    """

    squares: Tensor  # float32 [N, queries, llm_width]; N is 1 but for tiles
    boxes: list[Box]  # the part of the image that each square shows
    seconds: float

    @property
    def embeds(self) -> Tensor:
        """Return the embeddings of the first square, float32 [queries, llm_width]."""
        return self.squares[0]


class Batcher:
    """Encode the images in the slots of a decode pool, in a thread of its own, by the rule above."""

    def __init__(
        self,
        pool: DecodePool,
        open_encoder: Callable[[], Encoder | PassCrops],
        in_flight: int,
        timeline: Timeline | None = None,
    ):
        self._pool = pool
        self._open_encoder = open_encoder
        self._limit = in_flight + in_flight // 16
        self._timeline = timeline
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._decoded: asyncio.Queue[tuple[int, asyncio.Future[Encoded]]] = asyncio.Queue()
        self._below_limit = asyncio.Event()
        self._below_limit.set()
        self.captions = 0  # that the language model has to write

    @property
    def waiting(self) -> int:
        """Images that wait for the encoder."""
        return self._decoded.qsize()

    def count_captions(self, change: int) -> None:
        """Add to the number of captions that the language model has to write."""
        self.captions += change
        (self._below_limit.set if self.captions <= self._limit else self._below_limit.clear)()

    async def encode(self, slot: int) -> Encoded:
        """Encode the image in a slot of the pool, and release the slot."""
        encoded = asyncio.get_running_loop().create_future()
        self._decoded.put_nowait((slot, encoded))
        return await encoded

    async def run(self) -> None:
        """Encode batches until cancelled. Raises what keeps the encoder from loading or running."""
        loop = asyncio.get_running_loop()
        encoder = await loop.run_in_executor(self._thread, self._open_encoder)
        while True:
            batch = [await self._decoded.get()]
            await self._below_limit.wait()
            while len(batch) < encoder.batch and not self._decoded.empty():
                batch.append(self._decoded.get_nowait())
            needed = [(slot, encoded) for slot, encoded in batch if not encoded.done()]  # the others were cancelled
            squares = [self._pool.squares(slot) for slot, _ in needed]
            boxes = [self._pool.boxes(slot) for slot, _ in needed]
            images = np.concatenate(squares) if needed else None  # copies them
            for slot, _ in batch:
                self._pool.release(slot)
            if not needed:
                continue
            start = time.monotonic()
            rows = await loop.run_in_executor(self._thread, encoder, images)
            seconds = time.monotonic() - start
            if self._timeline:
                self._timeline.span("the encoder", start, images=len(needed), waiting=self.waiting)
            parts = rows.split([len(shown) for shown in boxes])
            for (_, encoded), part, shown in zip(needed, parts, boxes, strict=True):
                if not encoded.done():
                    # a copy: a view would keep the full batch in memory until its last image is captioned
                    encoded.set_result(Encoded(part.clone(), shown, seconds))
            await asyncio.sleep(0)  # the tasks that waited count their captions before the next batch is taken
