"""Decide how long to wait before a request is sent again: by the server's Retry-After header, else by a backoff."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

FIRST_DELAY, MAX_BACKOFF = 0.5, 8.0  # seconds
MAX_DELAY = 120.0  # seconds that a server may make a client wait


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Return the seconds that a Retry-After header asks for; None without a usable one.

    `value`: a number of seconds, decimals included, or an HTTP date (RFC 9110, section 10.2.3); `now`: Unix time.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def retry_delay(attempt: int, headers: Mapping[str, str] | None = None) -> float:
    """Return the seconds to wait after the failed attempt number `attempt`, counted from 0.

    The server's own time counts (retry-after-ms, Retry-After), up to MAX_DELAY; without it the delay doubles from
    FIRST_DELAY to MAX_BACKOFF. Up to a tenth is added at random, so that many clients do not return at once.
    """
    found = {name.lower(): value for name, value in (headers or {}).items()}
    milliseconds = retry_after(found.get("retry-after-ms"))
    seconds = retry_after(found.get("retry-after")) if milliseconds is None else milliseconds / 1000
    if seconds is None:
        seconds = min(FIRST_DELAY * 2 ** min(attempt, 10), MAX_BACKOFF)
    return min(seconds, MAX_DELAY) * (1 + random.random() / 10)
