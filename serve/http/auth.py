"""Authenticate callers by API keys, of which the server knows only the SHA-256.

key = Keys.add("keys.json", "alice")     # returns the key once; the file keeps its hash
keys = Keys.load("keys.json")
caller = keys.find("Bearer vlv-...")     # raises ApiError 401
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from serve.http.errors import ApiError
from vlv.common.command import Misuse, UserError, why


class KeysError(UserError, ValueError):
    """Raised for a key file that cannot be read or written; the message says why."""


@dataclass
class Key:
    """One caller and its limits. `sha256` is of 256 random bits, which need no slow password hash."""

    name: str
    sha256: str = ""
    per_minute: int = 6000  # images
    concurrent: int = 256  # images at a time
    active: int = field(default=0, compare=False)
    _tokens: float = field(default=math.inf, compare=False)
    _updated: float = field(default=0.0, compare=False)

    @property
    def limited(self) -> bool:
        """Return True for a key of a file; without a file there are no limits."""
        return bool(self.sha256)

    def rate_headers(self, now: float) -> dict[str, str]:
        """Return OpenAI's x-ratelimit headers; a request is an image here."""
        self._refill(now)
        left = max(0, math.floor(self._tokens))
        return {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{(self.per_minute - self._tokens) * 60 / self.per_minute:.2f}s",
        }

    def _refill(self, now: float) -> None:
        self._tokens = min(self.per_minute, self._tokens + (now - self._updated) * self.per_minute / 60)
        self._updated = now

    def consume(self, images: int, now: float) -> float:
        """Take `images` from the token bucket of one minute's images; return the seconds to wait if it has too few."""
        self._refill(now)
        if self._tokens < images:
            return (images - self._tokens) * 60 / self.per_minute
        self._tokens -= images
        return 0.0


class Keys:
    """Hold the callers that are let in; without a file, every caller is the same unlimited one."""

    def __init__(self, keys: list[Key] | None = None):
        self._keys = keys
        self._anybody = Key("anybody", per_minute=10**9, concurrent=10**9)

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
        entry = {k: v for k, v in asdict(Key(name, _sha256(key), **limits)).items() if k in FIELDS}
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump([*entries, entry], file, indent=2)
            os.replace(temporary, path)
        except OSError as error:
            raise KeysError(f"cannot write {path}: {why(error)}") from error
        return key

    def describe(self) -> str:
        """Return who is let in."""
        return "no API keys" if self._keys is None else f"{len(self._keys)} API keys"

    def find(self, authorization: str | None) -> Key:
        """Return the key of a header `Authorization: Bearer KEY`, in the same time for every wrong one."""
        if self._keys is None:
            return self._anybody
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = _sha256(given.strip()), None
        for key in self._keys:  # all of them, so that the time does not tell which one matched
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return found


FIELDS = ("name", "sha256", "per_minute", "concurrent")


def read_keys(file: Path | None, no_auth: bool, host: str) -> Keys:
    """Return the keys of `file`; without one, only a loopback `host` is allowed, unless `no_auth`. Raises Misuse."""
    if not (file or no_auth or is_loopback(host)):
        raise Misuse(f"--host {host} lets others in: give --keys FILE (make one with --new-key), or --no-auth")
    try:
        return Keys.load(file) if file else Keys()
    except KeysError as error:
        raise Misuse(str(error)) from error


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach a server at `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _entries(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise ValueError("expected a list")
        for entry in entries:
            if entry.keys() - set(FIELDS) or len(entry["sha256"]) != 64 or not entry["name"]:
                raise ValueError(f"an entry with the fields {sorted(entry)}")
            if min(entry["per_minute"], entry["concurrent"]) < 1:
                raise ValueError(f"per_minute and concurrent of {entry['name']} must be above 0")
    except OSError as error:
        raise KeysError(f"cannot read {path}: {why(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KeysError(f"{path} is no file of keys ({error}): make one with --new-key NAME") from error
    return entries


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
