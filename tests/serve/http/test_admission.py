"""Test admission by time: what can be finished within the deadline is admitted, the rest is refused at once."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter

import aiohttp
import pytest

from serve.http.admission import EXPIRY, Admission, Throughput
from serve.http.app import Bounds
from serve.http.auth import Key
from serve.http.errors import ApiError
from tests.serve.serving import Running, Scripted
from vlv.checkpoints.folder import Checkpoint

AT_ONCE = 4
PACE = 0.02  # seconds per token
TOKENS = 10


class LLMEngine(Scripted):
    """Write AT_ONCE captions together, as an engine on a GPU has a largest batch; the others wait."""

    async def tokens(self, embeds, sampling, every):
        if not hasattr(self, "gate"):
            self.gate = asyncio.Semaphore(AT_ONCE)
        async with self.gate:
            async for ids in super().tokens(embeds, sampling, every):
                yield ids


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, None, bounds=Bounds(deadline=5))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def image(scene_images) -> str:
    return "data:image/png;base64," + base64.b64encode((scene_images / "00.png").read_bytes()).decode()


def ask(server, image: str, count: int) -> tuple[Counter, list[float], list[int]]:
    """Send `count` requests at once; return their statuses, the seconds of refused ones, and their Retry-After."""

    async def run():
        statuses, refused, pauses = Counter(), [], []

        async def one(session) -> None:
            start = time.monotonic()
            body = {"images": [image], "max_tokens": TOKENS}
            async with session.post("/v1/captions", json=body) as answer:
                await answer.read()
                statuses[answer.status] += 1
                if answer.status == 503:
                    refused.append(time.monotonic() - start)
                    pauses.append(int(answer.headers["Retry-After"]))

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(server.url, connector=connector) as session:
            await asyncio.gather(*(one(session) for _ in range(count)))
        return statuses, refused, pauses

    return asyncio.run(run())


def test_a_burst_that_can_be_finished_is_answered_whole(captioning_checkpoint, image, monkeypatch):
    """500 requests at once, of which a server that admits by number answered 384; without and with a known rate."""
    monkeypatch.setattr(LLMEngine, "pace", 0.0001)
    server = Running(Checkpoint.open(captioning_checkpoint), LLMEngine, None, bounds=Bounds(deadline=200))
    try:
        for _ in range(2):
            statuses, _, _ = ask(server, image, 500)
            assert statuses == {200: 500}
    finally:
        server.stop()


def test_a_burst_that_cannot_be_finished_is_refused_at_once_in_part(server, image, monkeypatch):
    monkeypatch.setattr(LLMEngine, "pace", PACE)
    ask(server, image, 30)  # makes the rate known: 20 a second
    statuses, refused, pauses = ask(server, image, 400)
    assert statuses.keys() == {200, 503}, statuses  # what was admitted was also finished: no 504
    assert statuses[200] >= 30 and statuses[503] >= 200 and min(pauses) >= 1
    assert sorted(refused)[len(refused) // 2] < 2
    assert ask(server, image, 20)[0] == {200: 20}


def test_the_rate_is_that_of_a_busy_server():
    throughput = Throughput(busy_from=4)
    assert throughput.rate(0.0) is None
    for step in range(200):  # 10 images a second, with 2 in the server: it could do more
        throughput.finished(1, 2, 0.1 * step)
    assert throughput.rate(20.0) is None
    for step in range(200):  # 20 a second while it is busy
        throughput.finished(2, 8, 20 + 0.1 * step)
    assert throughput.rate(40.0) == pytest.approx(20, rel=0.05)
    for step in range(1000):  # it becomes slower: what was long ago counts less
        throughput.finished(1, 8, 40 + 0.2 * step)
    assert throughput.rate(240.0) == pytest.approx(5, rel=0.05)
    for step in range(100):  # requests that failed are no images
        throughput.finished(0, 8, 240 + 0.5 * step)
    assert throughput.rate(290.0) < 2
    assert throughput.rate(290.0 + 2 * EXPIRY) is None


def test_admission_follows_the_rate(monkeypatch):
    admission, key = Admission(None, in_flight=4, deadline=10.0), Key("a", concurrent=10**6, per_minute=10**6)
    monkeypatch.setattr(admission._throughput, "rate", lambda now: 2.0)
    with admission.enter(key) as lease:
        lease.reserve(15)  # 16 images in 8 s
        with pytest.raises(ApiError, match="needs 8 s") as refused, admission.enter(key):
            pass
        assert (refused.value.status, refused.value.code) == (503, "overloaded") and refused.value.retry_after >= 1
    monkeypatch.setattr(admission._throughput, "rate", lambda now: 0.01)
    with admission.enter(key) as lease:
        lease.reserve(3)  # so many are decoded together: always admitted
    monkeypatch.setattr(admission._throughput, "rate", lambda now: None)
    with admission.enter(key) as lease:
        lease.reserve(1000)  # nothing is known yet
