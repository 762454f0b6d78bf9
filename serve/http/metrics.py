"""Count what Prometheus reads from /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Hold one server's metrics in a registry of its own, so that a process can have several servers."""

    def __init__(self):
        self._registry = CollectorRegistry()

        def make(kind, name: str, about: str, labels: tuple[str, ...] = (), **more):
            return kind(f"vlv_{name}", about, labels, registry=self._registry, **more)

        self.requests = make(Counter, "requests", "Answers by route and status", ("route", "status"))
        self.refused = make(Counter, "refused", "Refused requests, by kind", ("kind",))
        self.images = make(Counter, "images", "Images by outcome", ("outcome",))
        self.tokens = make(Counter, "caption_tokens", "Tokens written")
        self.restarts = make(Counter, "engine_restarts", "Restarts of the language model")
        self.stages = make(Histogram, "stage_seconds", "Time of an image in a stage", ("stage",), buckets=SECONDS)
        self.first_token = make(
            Histogram, "first_token_seconds", "From the arrival of a request to its first text", buckets=SECONDS
        )
        self._gauges = {
            name: make(Gauge, name, about)
            for name, about in (
                ("ready", "1 while images can be captioned"),
                ("active_images", "Admitted images that are not answered yet"),
                ("encoder_queue", "Crops that wait for the encoder"),
                ("llm_requests", "Captions being written"),
            )
        }

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Call `value` whenever the gauge `name` is read."""
        self._gauges[name].set_function(value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.stages.labels(name).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        """Return Prometheus' exposition format."""
        return generate_latest(self._registry)
