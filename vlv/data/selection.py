"""Choose the rows that a training may use, in one pass over the data that is kept for later runs.

Left out are rows without a caption, where captions are needed, and images that miss the limits of size and shape. The
choice is kept in $XDG_CACHE_HOME/vlv/rows by the data, their files' sizes and dates, and the limits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vlv.common.files import atomic_write
from vlv.data.image import ImageError, image_size
from vlv.data.remote import DataError, cache_folder
from vlv.data.samples import Sample, Source

FORMAT = 2
HEAD = 65_536  # bytes of an image read for its header; a longer header is read whole
CHUNK = 256  # rows looked at together
THREADS = 8


@dataclass(frozen=True)
class Limits:
    """What a row must have; zeros leave nothing out."""

    captions: bool = False
    min_side: int = 0
    max_aspect: float = 0.0

    @property
    def needed(self) -> bool:
        """Return True if the rows must be looked at."""
        return self.captions or bool(self.min_side or self.max_aspect)

    def problem(self, sample: Sample, width: int = 0, height: int = 0) -> str:
        """Return why a row is left out, "" if it is not; the size is looked at where one is given."""
        if self.captions:
            if not sample.caption:
                return f"it has no caption{f' ({sample.problem})' if sample.problem else ''}"
            if not isinstance(sample.caption, str):
                kind = type(sample.caption).__name__
                return f"its caption is a {kind}, expected a text: give one caption a row, or a list as `captions`"
        short, long = sorted((width, height))
        if long and (short < self.min_side or (self.max_aspect and long > self.max_aspect * short)):
            return f"{short} x {long} pixels is left out by --min-side or --max-aspect"
        return ""


@dataclass(frozen=True)
class Selection:
    """The numbers of the rows of each shard that are used, how many are not, by reason, and which are no images."""

    rows: list[np.ndarray]
    left_out: dict[str, int]
    bad: list[tuple[str, str]]  # id and reason

    def __str__(self) -> str:
        """Return a sentence."""
        used, out = sum(map(len, self.rows)), sum(self.left_out.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{used:,} of {used + out:,} rows are used" + (f"; left out: {reasons}" if out else "")


def select(source: Source, limits: Limits, say: Callable[[str], None] = lambda text: None) -> Selection | None:
    """Return the rows that meet the limits, from the kept choice or by a pass over the data; None for all of them.

    `say` is told the progress. Raises DataError where no row is left, ServerError where a server fails.
    """
    if not limits.needed:
        return None
    digest = hashlib.sha256(f"{FORMAT} {source.fingerprint()} {limits}".encode()).hexdigest()[:24]
    kept = cache_folder("rows") / f"{digest}.npz"
    if kept.exists():
        with np.load(kept) as file:
            flags, found = file["flags"], json.loads(str(file["found"]))
    else:
        flags, found = _look(source, limits, say)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept, shared=True) as temporary, temporary.open("wb") as stream:
            np.savez(stream, flags=flags, found=np.array(json.dumps(found)))
    rows = [np.flatnonzero(part) for part in np.split(flags, np.cumsum(source.rows)[:-1])]
    selection = Selection(rows, found["left_out"], [tuple(pair) for pair in found["bad"]])
    if not any(map(len, rows)):
        missing = any("caption" in reason for reason in found["left_out"])
        remedy = "; captions come from a .txt or .json beside each image, or from vlv.train.distill" if missing else ""
        raise DataError(f"no row can be used: {selection}{remedy}")
    return selection


def _look(source: Source, limits: Limits, say: Callable[[str], None]) -> tuple[np.ndarray, dict]:
    """Return which rows meet the limits, in order, and a Selection's `left_out` and `bad`."""
    total, flags, reasons, bad = sum(source.rows), [], Counter(), []
    start = said = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda places: _reasons(source, limits, places), _chunks(source.rows)):
            flags += [not reason for reason, _ in found]
            reasons.update(reason for reason, _ in found if reason)
            bad += [error for _, error in found if error]
            now = time.monotonic()
            if now - said > 10:
                said, rate = now, len(flags) / (now - start)
                left = (total - len(flags)) / rate / 60
                say(f"looked at {len(flags):,} of {total:,} rows, {rate:,.0f} a second, {left:.1f} min to go")
    return np.array(flags), {"left_out": dict(reasons), "bad": bad}


def _chunks(rows: list[int]) -> Iterator[list[tuple[int, int]]]:
    for shard, count in enumerate(rows):
        for first in range(0, count, CHUNK):
            yield [(shard, row) for row in range(first, min(first + CHUNK, count))]


Verdict = tuple[str, tuple[str, str] | None]  # kind of reason, "" for none; id and error of what is no image


def _reasons(source: Source, limits: Limits, places: list[tuple[int, int]]) -> list[Verdict]:
    """Return for each row why it is left out."""
    sizes = bool(limits.min_side or limits.max_aspect)
    samples = source.read_many(places, limits.captions, HEAD if sizes else 0)
    return [_reason(source, limits, *of_row, sizes) for of_row in zip(places, samples, strict=True)]


def _reason(source: Source, limits: Limits, place: tuple[int, int], sample: Sample | Exception, sizes: bool) -> Verdict:
    if isinstance(sample, Exception):
        return "that cannot be read", (row_name(source, place), str(sample))
    if limits.problem(sample):
        return "without a caption", None
    if not sizes:
        return "", None
    try:
        size = image_size(sample.image)
    except ImageError:
        try:
            size = image_size(source.read(*place).image)
        except (ImageError, OSError, ValueError) as error:
            return "that are no images", (sample.id, str(error))
    return "too small or too long" if limits.problem(sample, *size) else "", None


def row_name(source: Source, place: tuple[int, int]) -> str:
    """Return a row's id if it is known without reading the row, else where it lies."""
    return source.name(*place) or f"row {place[1]} of shard {place[0]}"
