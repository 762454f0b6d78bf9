"""What Prometheus reads from /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's counters; a registry of its own, so that tests may have several."""

    def __init__(self):
        self._registry = CollectorRegistry()

        def make(kind, name: str, about: str, labels: tuple[str, ...] = (), **more):
            return kind(f"vlv_{name}", about, labels, registry=self._registry, **more)

        self.requests = make(Counter, "requests", "Answers by route and status", ("route", "status"))
        self.refused = make(Counter, "refused", "Requests that were not taken on, by kind", ("kind",))
        self.images = make(Counter, "images", "Images by what became of them", ("outcome",))
        self.tokens = make(Counter, "caption_tokens", "Tokens written")
        self.restarts = make(Counter, "engine_restarts", "Times that the language model had to be started again")
        self.stages = make(Histogram, "stage_seconds", "Time of an image in a stage", ("stage",), buckets=SECONDS)
        self.first_token = make(
            Histogram, "first_token_seconds", "From a request, once it has arrived, to its first text", buckets=SECONDS
        )
        self._gauges = {
            name: make(Gauge, name, about)
            for name, about in (
                ("ready", "1 while captions can be written"),
                ("active_images", "Images admitted and not answered yet"),
                ("encoder_queue", "Crops that wait for the encoder"),
                ("llm_requests", "Captions being written"),
            )
        }

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Read a gauge from `value` whenever it is asked for."""
        self._gauges[name].set_function(value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.stages.labels(name).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
