"""Test the metrics that the alerts use."""

from __future__ import annotations

import asyncio
import base64

import httpx
import pytest

from tests.serve.serving import Running, Scripted
from vlv.checkpoints.folder import Checkpoint


class LLMEngine(Scripted):
    """Counters of this module's server."""


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), LLMEngine)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ask(server, scene_images):
    url = "data:image/png;base64," + base64.b64encode((scene_images / "00.png").read_bytes()).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    path = server.url + "/v1/chat/completions"
    return lambda **fields: httpx.post(path, json={"messages": messages, **fields}, timeout=30)


def metric(server, name: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_the_first_text_counts_from_the_request(server, ask, monkeypatch):
    """Through all stages, and to what a client can read: the first sentence, not the first token."""
    encoded = server.service.encoded

    async def slow(content, crop):
        await asyncio.sleep(0.3)
        return await encoded(content, crop)

    monkeypatch.setattr(server.service, "encoded", slow)
    monkeypatch.setattr(LLMEngine, "pace", 0.05)
    before = metric(server, "vlv_first_token_seconds_sum")
    assert ask(stream=True).status_code == 200
    assert 0.3 + 5 * 0.05 < metric(server, "vlv_first_token_seconds_sum") - before < 4


def test_an_unexpected_error_is_counted(server, ask, monkeypatch):
    async def broken(content, crop):
        raise ZeroDivisionError

    monkeypatch.setattr(server.service, "encoded", broken)
    answer = ask()
    assert answer.status_code == 500 and "see the server's log" in answer.text
    assert metric(server, 'vlv_requests_total{route="/v1/chat/completions",status="500"}') == 1
