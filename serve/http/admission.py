"""Admit requests that can be finished within their deadline, and refuse the others at once.

with admission.enter(key) as lease:      # raises ApiError 429 or 503, with Retry-After
    lease.reserve(images - 1)

How long the present images and a new one will take is estimated from the rate at which images were finished while the
server was busy, that is, while it had at least as many as it decodes together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.http.auth import Key
from serve.http.errors import ApiError

MARGIN = 0.8  # of the deadline: the estimate may be wrong, and an answer that comes too late is worth nothing
MEMORY = 20.0  # seconds of busy time over which the rate is averaged
EXPIRY = 60.0  # seconds after which a rate that was not confirmed is forgotten


class Throughput:
    """Estimate how many images per second a busy server finishes."""

    def __init__(self, busy_from: int):
        """Count as busy while at least `busy_from` images are in the server."""
        self._busy_from = busy_from
        self._images = 0.0  # finished in the busy seconds, older ones weighted less
        self._seconds = 0.0
        self._last = -math.inf  # when images were finished last

    def finished(self, images: int, active: int, now: float) -> None:
        """Record that `images` were finished; `active` were in the server until now."""
        seconds, self._last = now - self._last, now
        if active < self._busy_from:
            return
        if seconds > EXPIRY:  # the first ones after a pause do not tell the rate
            self._images = self._seconds = 0.0
            return
        decay = math.exp(-seconds / MEMORY)
        self._images = self._images * decay + images
        self._seconds = self._seconds * decay + seconds

    def rate(self, now: float) -> float | None:
        """Return the images per second of a busy server; None if it is not known."""
        if now - self._last > EXPIRY or self._seconds < 0.5:
            return None
        return self._images / self._seconds


class AdmissionLease:
    """Count the images of one admitted request."""

    def __init__(self, admission: Admission, key: Key):
        self._admission = admission
        self._key = key
        self.images = 0

    def reserve(self, images: int) -> None:
        """Add `images` to the request. Raises ApiError if the key's limits or the server's capacity are exceeded."""
        if not images:
            return
        admission, key = self._admission, self._key
        limit = min(key.concurrent, key.per_minute, admission.capacity or key.per_minute)
        if self.images + images > limit:  # trying again would not help
            raise ApiError(400, "too_many", f"{self.images + images} captions in one request: at most {limit} here")
        if key.active + images > key.concurrent:
            raise ApiError(429, "too_many_at_once", f"more than {key.concurrent} images at a time for this key", 1)
        admission.check(images)
        if wait := key.consume(images, time.monotonic()):
            message = f"more than {key.per_minute} images a minute for this key"
            raise ApiError(429, "rate_limit_exceeded", message, wait)
        self.images += images
        key.active += images
        admission.active += images


class Admission:
    """Hold the images of all requests, and at most `max_bytes` of request bodies."""

    def __init__(
        self,
        capacity: int | None,
        max_bytes: int = 512 << 20,
        in_flight: int = 256,
        deadline: float = math.inf,
    ):
        """Limit the images at a time to `capacity`, or, if that is None, to those done within `deadline` seconds.

        `in_flight`: images that the language model decodes together; so many are always admitted.
        """
        self.capacity = capacity
        self.active = 0
        self.max_bytes = max_bytes
        self.bytes = 0
        self._in_flight = in_flight
        self._deadline = deadline
        self._throughput = Throughput(in_flight)
        self._seconds = 1.0  # moving average of a request's time

    def check(self, images: int) -> None:
        """Raise ApiError 503 if `images` more would exceed the capacity, or would not be finished in time."""
        total = self.active + images
        if self.capacity is not None:
            if total > self.capacity:
                raise ApiError(503, "overloaded", "the server is at its capacity", self.retry_after())
            return
        rate = self._throughput.rate(time.monotonic())
        if rate is None or total <= self._in_flight or (seconds := total / rate) <= MARGIN * self._deadline:
            return
        message = f"the server needs {seconds:.0f} s for what it has; a request must be done in {self._deadline:g} s"
        raise ApiError(503, "overloaded", message, max(1.0, seconds - MARGIN * self._deadline))

    def retry_after(self) -> float:
        """Return the seconds after which about half of the present requests are finished."""
        return max(1.0, self._seconds / 2)

    @contextmanager
    def enter(self, key: Key) -> Iterator[AdmissionLease]:
        """Admit a request of one image; its images are released at the end, whatever happens."""
        lease, start = AdmissionLease(self, key), time.monotonic()
        lease.reserve(1)
        done = False
        try:
            yield lease
            done = True
        finally:
            now = time.monotonic()
            self._throughput.finished(lease.images if done else 0, self.active, now)
            self._seconds += 0.05 * (now - start - self._seconds)
            self.active -= lease.images
            key.active -= lease.images

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the length of each piece of a body. Raises ApiError 503 above `max_bytes`."""
        received = 0

        def add(length: int) -> None:
            nonlocal received
            if self.bytes + length > self.max_bytes:
                raise ApiError(503, "overloaded", "the server holds as many requests as it can", self.retry_after())
            received += length
            self.bytes += length

        try:
            yield add
        finally:
            self.bytes -= received
