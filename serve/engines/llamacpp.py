"""The engine that runs llama.cpp on the CPU: continuous batching in a thread of this process, without PyTorch.

Every step computes the next token of all captions under way, and the prompt embeddings of new ones, in one batch over
one cache. llama.cpp ends the process on some wrong arguments, so embeddings are checked here before they reach it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from export.builders.gguf import SOURCE, cached_gguf, source_hash
from export.runtimes.llama_library import Entry, Llama
from serve.engines.base import EmbedsError, EngineError, LLMEngine, Sampling
from vlv.common.command import UserError, one_line

SEQUENCES = 32  # captions decoded together
# A file that is hardly larger than the CPU's caches: its weights cost less than attention, in which every row looks at
# the cells of all captions, and threads wait longer for each other than they compute.
SMALL, SMALL_SEQUENCES = 64 << 20, 8
ROWS = 512  # of a batch: prompts of several new captions, and one row for each under way
CELL_BYTES = 2  # of one number in the cache


@dataclass
class _Job:
    """One request; `steps` gets its new tokens, then None or an error, on the event loop."""

    embeds: np.ndarray  # float32 [queries, width]
    sampling: Sampling
    every: bool  # hand over each token as it comes
    random: np.random.Generator
    steps: asyncio.Queue = field(default_factory=asyncio.Queue)
    ids: list[int] = field(default_factory=list)
    handed: int = 0  # of the ids
    over: bool = False  # nobody waits for it any more


class LlamaCppEngine(LLMEngine):
    """Decode up to SEQUENCES requests together, of a small model SMALL_SEQUENCES; further ones wait."""

    name = "llamacpp"
    takes = frozenset({"gguf", "gguf_type"})
    alone = False  # True: no encoder computes beside it, and it takes all cores

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._waiting: deque[_Job] = deque()
        self._wake = threading.Event()
        self._closing = self._failed = False
        self._thread: threading.Thread | None = None
        self._cores = len(os.sched_getaffinity(0))
        # threads of a step, and of one of a caption alone, which has nothing to share the cores with
        self._threads, self._threads_alone = max(1, self._cores // 2), self._cores

    def _affordable(self) -> int:
        """Return the captions of full length whose cache fits into a quarter of the free memory."""
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return free // 4 // (self._positions * self.spec.kv_values * CELL_BYTES)

    @property
    def _positions(self) -> int:
        return self.spec.queries + self.max_tokens

    @property
    def encoder_threads(self) -> int:
        """Half of the cores: llama.cpp's threads wait in busy loops for one that has to share its core."""
        return max(1, self._cores - self._cores // 2)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        loaded = self._loop.create_future()
        # a daemon: the process may end without waiting for a step
        self._thread = threading.Thread(target=self._work, args=(loaded,), name="llamacpp", daemon=True)
        self._thread.start()
        try:
            await loaded
        except UserError as error:
            raise EngineError(str(error)) from error
        except Exception as error:
            raise EngineError(f"llama.cpp cannot load {self.spec.folder}: {one_line(error)}") from error

    def _load(self) -> Llama:
        self._load_tokenizer()
        options = self.options
        file = options.gguf or cached_gguf(self.spec.folder, options.gguf_type)
        small = file.is_file() and file.stat().st_size < SMALL
        if small:
            self._threads = self._threads_alone = 1
        elif self.alone:
            self._threads = self._cores
        sequences = min(self.in_flight, SMALL_SEQUENCES if small else SEQUENCES, self._affordable())
        self.sequences = max(1, sequences)
        rows = max(ROWS, self.spec.queries + self.sequences)
        llama = Llama(file, self.sequences, self.sequences * self._positions, self._threads, rows, self.debug)
        try:
            made_from = llama.metadata(SOURCE)
            if options.gguf and made_from and made_from != source_hash(self.spec.folder):
                raise EngineError(f"{file} was made from another language model: make it again with export.gguf")
            if llama.width != self.spec.width or llama.vocabulary < len(self._tokenizer):
                raise EngineError(
                    f"{file} takes embeddings of width {llama.width} and has {llama.vocabulary} tokens, the checkpoint "
                    f"{self.spec.width} and {len(self._tokenizer)}: the two do not belong together"
                )
        except EngineError:
            llama.close()
            raise
        return llama

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        self.spec.check(embeds)
        rows = np.ascontiguousarray(embeds.detach().float().cpu().numpy())
        if not np.isfinite(rows).all():  # a float64 beyond float32
            raise EmbedsError("the embeddings are not finite in float32")
        job = _Job(rows, sampling, every, np.random.default_rng(sampling.seed & (1 << 64) - 1))
        self._waiting.append(job)
        self._wake.set()
        if not self.alive:  # asked after the append: a thread that ends now finds the job, or this finds its end
            raise EngineError("llama.cpp has failed")
        try:
            while (step := await job.steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            job.over = True

    def _work(self, loaded: asyncio.Future) -> None:
        """Load, decode until `close`, and free the model: all of the thread."""
        try:
            llama = self._load()
        except BaseException as error:
            self._failed = True
            self._call(_settle, loaded, error)
            return
        self._call(_settle, loaded, None)
        jobs: dict[int, _Job] = {}  # by sequence
        failure = "the engine was closed"
        try:
            self._decode(llama, jobs)
        except Exception as error:
            failure = f"llama.cpp has failed: {one_line(error)}"
        self._failed = True
        self._call(_finish, [*jobs.values(), *self._waiting], EngineError(failure))
        llama.close()

    def _decode(self, llama: Llama, jobs: dict[int, _Job]) -> None:
        free = list(range(self.sequences))
        threads = 0
        while not self._closing:
            if not jobs and not self._waiting:
                self._wake.wait()
                self._wake.clear()
                continue
            for sequence in [sequence for sequence, job in jobs.items() if job.over]:
                self._release(llama, jobs, free, sequence)
            entries = [Entry(s, len(job.embeds) + len(job.ids) - 1, job.ids[-1]) for s, job in jobs.items()]
            rows = len(entries)
            while free and self._waiting and rows + self.spec.queries <= llama.batch:
                job = self._waiting.popleft()
                if not job.over:
                    sequence = free.pop()
                    jobs[sequence] = job
                    entries.append(Entry(sequence, 0, job.embeds))
                    rows += len(job.embeds)
            if entries:
                wanted = self._threads_alone if len(jobs) == 1 else self._threads
                if wanted != threads:
                    threads = wanted
                    llama.set_threads(threads)
                self._step(llama, jobs, free, entries)

    def _step(self, llama: Llama, jobs: dict[int, _Job], free: list[int], entries: list[Entry]) -> None:
        """Compute one step, choose a token for each entry, and hand over what requests wait for."""
        logits = llama.step(entries)
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(entries)), best]).tolist()
        news: list[tuple[_Job, list[int], bool | Exception]] = []
        for row, likeliest, good, entry in zip(logits, best.tolist(), finite, entries, strict=True):
            job = jobs[entry.sequence]
            if not good:
                self._release(llama, jobs, free, entry.sequence)
                news.append((job, [], EmbedsError("the language model's logits are not finite for this image")))
                continue
            token = choose(row, likeliest, job, self.ends)
            job.ids.append(token)
            ended = token in self.ends and not job.sampling.ignore_eos
            done = ended or len(job.ids) >= min(job.sampling.max_tokens, self.max_tokens)
            if done:
                self._release(llama, jobs, free, entry.sequence)
            if done or job.every:
                news.append((job, job.ids[job.handed :], done))
                job.handed = len(job.ids)
        if news:
            self._call(_hand_over, news)

    @staticmethod
    def _release(llama: Llama, jobs: dict[int, _Job], free: list[int], sequence: int) -> None:
        llama.release(sequence)
        del jobs[sequence]
        free.append(sequence)

    def _call(self, function, *args) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._failed

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)  # at most a step, or the loading


def choose(logits: np.ndarray, likeliest: int, job: _Job, ends: tuple[int, ...]) -> int:
    """Return the next token of a request, by its sampling. logits: float32 [vocabulary], finite at `likeliest`."""
    sampling = job.sampling
    if len(job.ids) < sampling.min_tokens:
        logits = logits.copy()
        logits[list(ends)] = -np.inf
        likeliest = int(logits.argmax())
    if not sampling.temperature:
        return likeliest
    scaled = (logits.astype(np.float64) - logits[likeliest]) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order])
    weights = weights[weights >= sampling.min_p]  # the likeliest has 1
    shares = np.cumsum(weights) / weights.sum()
    count = int(np.searchsorted(shares, sampling.top_p)) + 1 if sampling.top_p < 1 else len(shares)
    shares = shares[:count]
    drawn = int(np.searchsorted(shares, job.random.random() * shares[-1], side="right"))
    return int(order[min(drawn, len(shares) - 1)])


def _settle(future: asyncio.Future, error: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _hand_over(news: list[tuple[_Job, list[int], bool | Exception]]) -> None:
    for job, ids, end in news:
        if ids:
            job.steps.put_nowait(ids)
        if isinstance(end, Exception):
            job.steps.put_nowait(end)
        elif end:
            job.steps.put_nowait(None)


def _finish(jobs: list[_Job], error: EngineError) -> None:
    for job in jobs:
        job.steps.put_nowait(error)
