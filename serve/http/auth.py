"""Who may ask, how often, and how much at a time: API keys, rates, and admission to the server.

keys = Keys.load("keys.json")            # hashes only: the keys themselves are shown once, when they are made
key = keys.find(bearer)                  # raises ApiError 401
with admission.enter(key) as place:      # raises ApiError 429 or 503, with Retry-After
    place.take(images - 1)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlv.common.command import UserError, why


class ApiError(Exception):
    """A request that is not answered: HTTP status, kind, one sentence, and perhaps when to come again."""

    def __init__(self, status: int, kind: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, retry_after


class KeysError(UserError, ValueError):
    """A key file that cannot be used; the message says why."""


@dataclass
class Key:
    """One caller, and what it may do. `sha256` is of a random key of 256 bits, which needs no slow hash."""

    name: str
    sha256: str = ""
    per_minute: int = 6000  # images
    concurrent: int = 256  # images at a time
    active: int = field(default=0, compare=False)
    _tokens: float = field(default=math.inf, compare=False)
    _since: float = field(default=0.0, compare=False)

    def draw(self, images: int, now: float) -> float:
        """Take from the bucket, which holds a minute's images; seconds to wait where there are too few, else 0."""
        self._tokens = min(self.per_minute, self._tokens + (now - self._since) * self.per_minute / 60)
        self._since = now
        if self._tokens < images:
            return (images - self._tokens) * 60 / self.per_minute
        self._tokens -= images
        return 0.0


class Keys:
    """The callers that are let in; without a file, everybody is the same one."""

    def __init__(self, keys: list[Key] | None = None):
        self._keys, self._anybody = keys, Key("anybody", per_minute=10**9, concurrent=10**9)

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Read a file that `add` has written. Raises KeysError."""
        return cls([Key(**entry) for entry in _entries(Path(path))])

    @staticmethod
    def add(path: str | Path, name: str, **limits: int) -> str:
        """Make a key, append its hash to the file (readable by its owner only) and return the key itself."""
        path, key = Path(path), f"vlv-{secrets.token_urlsafe(32)}"
        entries = _entries(path) if path.exists() else []
        if any(entry["name"] == name for entry in entries):
            raise KeysError(f"{path} has a key {name!r} already: remove that entry, or choose another name")
        kept = {k: v for k, v in asdict(Key(name, _sha256(key), **limits)).items() if k in FIELDS}
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump([*entries, kept], file, indent=2)
            os.replace(temporary, path)
        except OSError as error:
            raise KeysError(f"cannot write {path}: {why(error)}") from error
        return key

    def find(self, authorization: str | None) -> Key:
        """The key of a header `Authorization: Bearer ...`; takes the same time for every wrong one."""
        if self._keys is None:
            return self._anybody
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = _sha256(given.strip()), None
        for key in self._keys:  # all of them, so that the time does not tell which
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            raise ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
        return found


FIELDS = ("name", "sha256", "per_minute", "concurrent")


def _entries(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise ValueError("no list")
        for entry in entries:
            if entry.keys() - set(FIELDS) or len(entry["sha256"]) != 64 or not entry["name"]:
                raise ValueError(f"no entry of a key: {sorted(entry)}")
            if min(entry["per_minute"], entry["concurrent"]) < 1:
                raise ValueError(f"per_minute and concurrent of {entry['name']} must be above 0")
    except OSError as error:
        raise KeysError(f"cannot read {path}: {why(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KeysError(f"{path} is no file of keys ({error}): make one with --new-key NAME") from error
    return entries


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class AdmissionLease:
    """What an admitted request holds, counted in images."""

    def __init__(self, admission: Admission, key: Key):
        self._admission, self._key, self.images = admission, key, 0

    def take(self, images: int) -> None:
        """Hold `images` more. Raises ApiError where the key or the server has no room for them."""
        admission, key = self._admission, self._key
        most = min(key.concurrent, key.per_minute, admission.capacity)
        if self.images + images > most:  # coming again would not help
            raise ApiError(400, "too_many", f"{self.images + images} captions in one request: at most {most} here")
        if key.active + images > key.concurrent:
            raise ApiError(429, "too_many_at_once", f"more than {key.concurrent} images at a time for this key", 1)
        if admission.active + images > admission.capacity:
            raise ApiError(503, "overloaded", "the server is at its capacity", admission.retry_after())
        if wait := key.draw(images, time.monotonic()):
            raise ApiError(429, "rate_limit", f"more than {key.per_minute} images a minute for this key", wait)
        self.images += images
        key.active += images
        admission.active += images


class Admission:
    """At most `capacity` images and `max_bytes` of requests at a time: what comes beyond is refused, not queued."""

    def __init__(self, capacity: int, max_bytes: int = 512 << 20):
        self.capacity, self.active = capacity, 0
        self.max_bytes, self.bytes = max_bytes, 0
        self._seconds = 1.0  # an image's way through, averaged

    def retry_after(self) -> float:
        """When it makes sense to come again: about when half of what is here has gone."""
        return max(1.0, self._seconds / 2)

    @contextmanager
    def enter(self, key: Key) -> Iterator[AdmissionLease]:
        """A place for a request of one image, for now; given back at the end whatever happens."""
        place, start = AdmissionLease(self, key), time.monotonic()
        place.take(1)
        try:
            yield place
        finally:
            self.active -= place.images
            key.active -= place.images
            self._seconds += 0.05 * (time.monotonic() - start - self._seconds)

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Room for a request's body: call it with each piece's length. Raises ApiError 503 where there is none."""
        arrived = 0

        def grow(length: int) -> None:
            nonlocal arrived
            if self.bytes + length > self.max_bytes:
                raise ApiError(503, "overloaded", "the server holds as many requests as it can", self.retry_after())
            arrived += length
            self.bytes += length

        try:
            yield grow
        finally:
            self.bytes -= arrived
