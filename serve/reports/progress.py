"""Show the progress of a run on stderr: counts, images per second, and the time left."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field

WINDOW = 60  # seconds over which the rate is taken


@dataclass
class Progress:
    """Count one run's images. `total` is set once the input has been counted."""

    captioned: int = 0
    failed: int = 0
    skipped: int = 0  # finished by an earlier run
    repeated: int = 0  # named before in this input
    total: int | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None  # seconds from start to the first caption
    _recent: deque = field(default_factory=deque)
    _width: int = 0
    _shown: tuple = ()

    @property
    def finished(self) -> int:
        """Return the images of this run that have a caption or an error."""
        return self.captioned + self.failed

    @property
    def _counts(self) -> tuple:
        return self.captioned, self.failed, self.skipped, self.repeated, self.first is None

    def caption(self) -> None:
        """Count a captioned image."""
        self.captioned += 1
        if self.first is None:
            self.first = time.monotonic() - self.started

    def rate(self) -> float:
        """Return the images per second over the last minute, counted from the first caption."""
        now = time.monotonic()
        if self.first is None:
            return 0.0
        self._recent.append((now, self.finished))
        while now - self._recent[0][0] > WINDOW:
            self._recent.popleft()
        (then, before) = self._recent[0]
        return (self.finished - before) / (now - then) if now > then else 0.0

    def line(self) -> str:
        """Return the state of the run: images done, rate, time left."""
        rate, total = self.rate(), self.total
        done = self.finished + self.skipped + self.repeated
        parts = [f"{done}" + (f"/{total}" if total else "") + " images"]
        if self.first is None:
            parts.append("loading the models")
        else:
            parts.append(f"{rate:.1f} images/s")
            if total and rate:
                parts.append(f"ETA {_clock(max(0, total - done) / rate)}")
        return "  ".join(parts + self._remarks())

    def summary(self) -> str:
        """Return the result of the run."""
        seconds = time.monotonic() - self.started
        parts = [f"{self.captioned} images captioned in {_clock(seconds)}"]
        if self.first is not None:
            parts.append(f"the first after {self.first:.1f} s")
            if self.captioned > 1:
                parts.append(f"then {(self.captioned - 1) / max(seconds - self.first, 1e-3):.1f} images/s")
        return ", ".join(parts + self._remarks())

    def _remarks(self) -> list[str]:
        failed = [f"{self.failed} failed"] if self.failed else []
        skipped = [f"{self.skipped} done before"] if self.skipped else []
        return failed + skipped + ([f"{self.repeated} named twice"] if self.repeated else [])

    def show(self, line: str, last: bool = False) -> None:
        """Write a line to stderr; on a terminal it replaces the previous one."""
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
            self._width = len(line)
        elif last or self._counts != self._shown:  # in a file or pipe, a line only if something has changed
            self._shown = self._counts
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
