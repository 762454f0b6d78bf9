"""Admit requests up to the server's capacity, counted in images and in bytes; refuse the rest at once.

with admission.enter(key) as lease:      # raises ApiError 429 or 503, with Retry-After
    lease.reserve(images - 1)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.http.auth import Key
from serve.http.errors import ApiError


class AdmissionLease:
    """Count the images of one admitted request."""

    def __init__(self, admission: Admission, key: Key):
        self._admission = admission
        self._key = key
        self.images = 0

    def reserve(self, images: int) -> None:
        """Add `images` to the request. Raises ApiError if the key's limits or the server's capacity are exceeded."""
        admission, key = self._admission, self._key
        limit = min(key.concurrent, key.per_minute, admission.capacity)
        if self.images + images > limit:  # trying again would not help
            raise ApiError(400, "too_many", f"{self.images + images} captions in one request: at most {limit} here")
        if key.active + images > key.concurrent:
            raise ApiError(429, "too_many_at_once", f"more than {key.concurrent} images at a time for this key", 1)
        if admission.active + images > admission.capacity:
            raise ApiError(503, "overloaded", "the server is at its capacity", admission.retry_after())
        if wait := key.consume(images, time.monotonic()):
            raise ApiError(429, "rate_limit", f"more than {key.per_minute} images a minute for this key", wait)
        self.images += images
        key.active += images
        admission.active += images


class Admission:
    """Hold at most `capacity` images and `max_bytes` of request bodies at a time; the rest is refused, not queued."""

    def __init__(self, capacity: int, max_bytes: int = 512 << 20):
        self.capacity = capacity
        self.active = 0
        self.max_bytes = max_bytes
        self.bytes = 0
        self._seconds = 1.0  # moving average of a request's time

    def retry_after(self) -> float:
        """Return the seconds after which about half of the present requests are finished."""
        return max(1.0, self._seconds / 2)

    @contextmanager
    def enter(self, key: Key) -> Iterator[AdmissionLease]:
        """Admit a request of one image; its images are released at the end, whatever happens."""
        lease, start = AdmissionLease(self, key), time.monotonic()
        lease.reserve(1)
        try:
            yield lease
        finally:
            self.active -= lease.images
            key.active -= lease.images
            self._seconds += 0.05 * (time.monotonic() - start - self._seconds)

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
