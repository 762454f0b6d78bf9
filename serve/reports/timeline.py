"""Record when each stage works: a trace for Perfetto (https://ui.perfetto.dev), and the stage that limits the rate.

timeline = Timeline("out.json")
timeline.places["the encoder"] = 1
timeline.span("the encoder", start, end, images=32)     # seconds of time.monotonic()
print(timeline.summary())
"""

from __future__ import annotations

import heapq
import json
import time
from pathlib import Path

from serve.outputs.jsonl import explained

MIN_SECONDS = 10.0  # of a run without loading, before its busiest stage says anything about a longer one


class Timeline:
    """Write spans as they come, so that memory does not grow; an interrupted trace can still be read."""

    def __init__(self, path: str | Path | None = None):
        """Open the trace's file; without `path` no trace is written. Raises SinkError."""
        self.places: dict[str, int] = {}  # how many items a stage can work on at a time
        self.window: float | None = None  # since when all stages were loaded; the summary begins here
        self._busy: dict[str, float] = {}
        self._lanes: dict[str, list[tuple[float, int]]] = {}
        self._start, self._named, self._path = time.monotonic(), set(), path
        self._file = None
        if path is not None:
            with explained(path):
                self._file = open(path, "w")  # noqa: SIM115  closed by close()
                self._file.write("[")

    def span(self, stage: str, start: float, end: float | None = None, name: str | None = None, **about) -> None:
        """Record that `stage` worked from `start` to `end` (now), in seconds of time.monotonic()."""
        end = time.monotonic() if end is None else end
        if self.window is not None:
            self._busy[stage] = self._busy.get(stage, 0.0) + max(0.0, end - max(start, self.window))
        if self._file is not None:
            event = {"ph": "X", "name": name or stage, "cat": stage, "ts": self._micro(start), "args": about}
            self._write({**event, "dur": round((end - start) * 1e6), "tid": self._lane(stage, start, end)})

    def _lane(self, stage: str, start: float, end: float) -> int:
        """Return the first row of the stage that is free at `start`: the spans of one row must not overlap."""
        free = self._lanes.setdefault(stage, [])
        if free and free[0][0] <= start:
            _, lane = heapq.heapreplace(free, (end, free[0][1]))
        else:
            lane = len(free)
            heapq.heappush(free, (end, lane))
        row = 10_000 * (1 + list(self._lanes).index(stage)) + lane
        if row not in self._named:
            self._named.add(row)
            self._write({"ph": "M", "name": "thread_name", "tid": row, "args": {"name": f"{stage} {lane + 1}"}})
        return row

    def _micro(self, when: float) -> int:
        return round((when - self._start) * 1e6)

    def _write(self, event: dict) -> None:
        with explained(self._path):
            self._file.write(f"\n{json.dumps({'pid': 1, **event})},")

    def utilisation(self) -> dict[str, float]:
        """Return for each stage the part of its capacity that was busy since all stages were loaded."""
        if self.window is None:
            return {}
        seconds = max(time.monotonic() - self.window, 1e-9)
        return {stage: self._busy.get(stage, 0.0) / (places * seconds) for stage, places in self.places.items()}

    def summary(self) -> str:
        """Return one line: how busy each stage was, and, after MIN_SECONDS, which one limits the rate."""
        used = self.utilisation()
        if not used or not any(used.values()):
            return ""
        parts = [f"{stage} {min(part, 1):.0%} of {self.places[stage]}" for stage, part in used.items()]
        busy = f"busy: {', '.join(parts)}"
        if time.monotonic() - self.window < MIN_SECONDS:
            return busy
        return f"{busy}; the pace was set by {max(used, key=used.get)}"

    def close(self) -> None:
        """Complete the file."""
        if self._file is not None:
            with explained(self._path):
                self._file.write('\n{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "VLV"}}]\n')
                self._file.close()
