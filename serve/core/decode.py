"""Decode image files in processes, into uint8 crops in shared memory.

Processes are used because Pillow holds the GIL for much of its work, and because a file that kills its decoder (a crash
in a codec, the kernel's out-of-memory killer) then costs one image and not the run. The pool of concurrent.futures does
not fit: it is unusable after one crash, cannot name the file, and its processes outlive a parent that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import multiprocessing
import os
import signal
import time
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd

import numpy as np

from serve.core.inputs import Item
from vlv.common.command import UserError, one_line
from vlv.data.decoding.crop import MAX_TILES, Box
from vlv.data.image import MAX_PIXELS, ImageError, load_crops

_Job = tuple[Item, int, str, asyncio.Future]  # an item, its slot, its crop, and the future of its result
WINDOW = 2  # items sent to a process: the one it decodes, and the next, so that it need not wait


class DecodeError(UserError, RuntimeError):
    """Raised when decode processes cannot be started at all."""


class SharedSquares:
    """Squares in memory that processes share, `pixels` uint8 [slots, MAX_TILES, 3, size, size].

    A part takes memory once a square has been written there: most images have one.
    """

    def __init__(self, slots: int, size: int, file: int | None = None):
        """`file`: descriptor of the memory, if it exists already."""
        self._arguments = slots, size
        if file is None:
            file = os.memfd_create("squares")
            os.ftruncate(file, slots * MAX_TILES * 3 * size * size)
        self._file = file
        self.pixels = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(slots, MAX_TILES, 3, size, size)

    def __reduce__(self):  # for a process that is being started
        return _attach, (*self._arguments, DupFd(self._file))

    def close(self) -> None:
        """Let no further process have the memory, which lives as long as `pixels`."""
        os.close(self._file)


def _attach(slots: int, size: int, file) -> SharedSquares:
    return SharedSquares(slots, size, file.detach())


def _work(pipe: Connection, memory: SharedSquares, size: int, *options) -> None:
    """Send None once running; then decode (item, slot, crop) until the pipe ends. `options`: the others of load_crops.

    Sends for each item an error (kind, message) or None, its start and end by the machine's monotonic clock, and the
    boxes of its squares (none after an error).
    """
    # Ctrl-C reaches the whole process group: the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(None)
    while True:
        try:
            item, slot, crop = pipe.recv()
        except (EOFError, OSError):  # the parent has closed the pipe, or was killed
            return
        start, boxes = time.monotonic(), []
        try:
            found = load_crops(item.read(), size, crop, *options)
            memory.pixels[slot, : len(found.pixels)] = found.pixels
            answer, boxes = None, found.boxes
        except ImageError as error:
            answer = (error.kind, str(error))
        except MemoryError:
            answer = ("too-large", "not enough memory to decode the image")
        except Exception as error:  # of a codec, or ours: it costs one image
            answer = ("damaged", f"it cannot be decoded: {one_line(error)}")
        try:
            pipe.send((answer, start, time.monotonic(), boxes))
        except OSError:
            return


class DecodeWorker:
    """One process, the parent's end of its pipe, and the jobs that it has not answered yet (oldest first)."""

    def __init__(self, context, *args):
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(child_end, *args), name="vlv-decode", daemon=True)
        # the child inherits the mask: a Ctrl-C while it is still importing would print a traceback
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child_end.close()
        self.waiting: deque[_Job] = deque()
        self.ready = False


class DecodePool:
    """Decode items for any number of tasks; the squares of at most `slots` images exist at a time.

    An image occupies a slot until `release`, which bounds the memory for any input. Use it as an async context
    manager, from one event loop.
    """

    def __init__(
        self,
        size: int,
        workers: int,
        slots: int,
        max_pixels: int = MAX_PIXELS,
        ignore_icc: bool = False,
        fast_jpeg: bool = False,
    ):
        """size: of the crops. max_pixels, ignore_icc, fast_jpeg: as for `vlv.data.image.load_crops`."""
        self._context = multiprocessing.get_context("spawn")
        self._memory = SharedSquares(slots, size)
        self.crops = self._memory.pixels[:, 0]  # uint8 [slots, 3, size, size]: the first square of each image
        self._boxes: dict[int, list[Box]] = {}  # by slot
        self._size = size
        self._free = deque(range(slots))
        self._available = asyncio.Semaphore(slots)
        self._count = workers
        self._workers: list[DecodeWorker] = []
        self._options = max_pixels, ignore_icc, fast_jpeg
        self._backlog: deque[_Job] = deque()
        self._broken: DecodeError | None = None

    async def __aenter__(self) -> DecodePool:
        for _ in range(self._count):
            self._start()
        return self

    async def __aexit__(self, *_) -> None:
        loop = asyncio.get_running_loop()
        for worker in self._workers:
            loop.remove_reader(worker.pipe.fileno())
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._memory.close()

    async def slot(self) -> int:
        """Reserve a free slot, and return it as soon as there is one."""
        await self._available.acquire()
        return self._free.popleft()

    def release(self, slot: int) -> None:
        """Give a slot back, once its squares have been copied or are not needed."""
        self._boxes.pop(slot, None)
        self._free.append(slot)
        self._available.release()

    def squares(self, slot: int) -> np.ndarray:
        """Return the squares of the image in a slot, uint8 [N, 3, size, size]: a view, valid until its release."""
        return self._memory.pixels[slot, : len(self._boxes[slot])]

    def boxes(self, slot: int) -> list[Box]:
        """Return the part of the image in a slot that each of its squares shows."""
        return self._boxes[slot]

    async def decode(self, item: Item, slot: int, crop: str = "center") -> tuple[float, float]:
        """Decode into a slot; return start and end by time.monotonic().

        `crop`: as for `vlv.data.image.load_crops`. Raises ImageError or DecodeError.
        """
        if self._broken:
            raise self._broken
        answer = asyncio.get_running_loop().create_future()
        self._backlog.append((item, slot, crop, answer))
        self._distribute()
        start, end, self._boxes[slot] = await answer
        return start, end

    def _start(self) -> None:
        worker = DecodeWorker(self._context, self._memory, self._size, *self._options)
        self._workers.append(worker)
        asyncio.get_running_loop().add_reader(worker.pipe.fileno(), self._readable, worker)

    def _distribute(self) -> None:
        while self._backlog:
            worker = min(self._workers, key=lambda w: len(w.waiting))
            if len(worker.waiting) == WINDOW:
                return
            job = self._backlog.popleft()
            worker.waiting.append(job)
            with contextlib.suppress(OSError):  # it has died: its pipe ends, and _died sends the job to another
                worker.pipe.send(job[:3])

    def _readable(self, worker: DecodeWorker) -> None:
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            self._died(worker)
            return
        if worker.ready:
            problem, *result = answer
            _settle(worker.waiting.popleft(), ImageError(*problem) if problem else None, tuple(result))
            self._distribute()
        worker.ready = True

    def _died(self, worker: DecodeWorker) -> None:
        """Fail the oldest unanswered item, which killed the process; send the others to another one."""
        asyncio.get_running_loop().remove_reader(worker.pipe.fileno())
        worker.pipe.close()
        worker.process.join()
        self._workers.remove(worker)
        ending = _ending(worker.process)
        if not worker.ready:
            self._broken = DecodeError(f"a decode process did not start ({ending}): its message is above")
            for job in [*worker.waiting, *self._backlog]:
                _settle(job, self._broken)
            self._backlog.clear()
            return
        if worker.waiting:
            _settle(worker.waiting.popleft(), ImageError("damaged", f"decoding it killed the process ({ending})"))
        self._backlog.extendleft(reversed(worker.waiting))
        self._start()
        self._distribute()


def _settle(job: _Job, failure: Exception | None, result: tuple = ()) -> None:
    answer = job[3]
    if answer.done():  # its task was cancelled
        return
    if failure:
        answer.set_exception(failure)
    else:
        answer.set_result(result)


def _ending(process) -> str:
    code = process.exitcode
    return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


def default_workers() -> int:
    """Return the number of decode processes: the cores that this process may use, less one for the models."""
    return max(1, min(len(os.sched_getaffinity(0)) - 1, 32))
