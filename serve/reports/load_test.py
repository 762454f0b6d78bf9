"""Offer load to a captioning server and measure its latencies, throughput, goodput and cost.

Open loop: requests arrive by a Poisson process whether or not earlier ones are answered, so that a server that falls
behind shows it. Every request is a streamed chat completion of one image. The times are those of LLM serving: to the
first token (TTFT), per further token (TPOT), between pieces of text (ITL) and to the end (e2e).
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from dataclasses import dataclass, field

import aiohttp

from serve.core.inputs import expand
from vlv.common.command import Misuse, say

MEASURES = ("ttft", "tpot", "itl", "e2e")
MAX_IMAGES = 256  # different images that are asked for


@dataclass(frozen=True)
class LoadConfig:
    """What is offered, and what counts as good."""

    paths: tuple[str, ...]
    url: str = "http://127.0.0.1:8000"
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)  # requests a second
    seconds: float = 30  # of arrivals at each rate
    max_tokens: int = 300
    slo_ttft: float = 1.0  # seconds
    slo_e2e: float = 10.0  # seconds
    price: float = 0.0  # of the server, per hour
    devices: int = 1
    seed: int = 0
    api_key: str | None = None


@dataclass
class Request:
    """The times of one request, in seconds since it was due."""

    status: str = "pending"
    pieces: list[float] = field(default_factory=list)  # when each piece of text arrived
    tokens: int = 0
    end: float = 0.0

    @property
    def measures(self) -> dict[str, list[float]]:
        """Return what the request adds to each of MEASURES."""
        first, steps = self.pieces[0], max(self.tokens - 1, 1)
        gaps = [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]
        return {"ttft": [first], "tpot": [(self.pieces[-1] - first) / steps], "itl": gaps, "e2e": [self.end]}


async def measure(config: LoadConfig) -> dict:
    """Return the report over all rates. Raises Misuse if no server answers."""
    if not config.url.startswith(("http://", "https://")):
        raise Misuse(f"--url {config.url}: expected a URL such as http://127.0.0.1:8000")
    urls = [_data_url(item.read()) for item, _ in zip(expand(config.paths), range(MAX_IMAGES), strict=False)]
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(config.url, connector=connector, timeout=timeout, headers=headers) as session:
        try:
            async with session.get("/v1/models") as answer:
                model = (await answer.json())["data"][0]["id"]
        except (aiohttp.ClientError, OSError, LookupError, ValueError, TypeError) as error:
            raise Misuse(f"--url: no captioning server answers at {config.url} ({type(error).__name__})") from error
        await asyncio.gather(*(_request(session, url, 8) for url in urls[:8]))  # warm-up
        sweep = []
        for rate in config.rates:
            point = await _offer(session, urls, rate, config)
            sweep.append(point)
            say(f"{rate:g}/s offered: {point['answered_per_second']}/s answered, e2e p99 {point['e2e']['p99']} s")
    return {
        "model": model,
        "seconds": config.seconds,
        "max_tokens": config.max_tokens,
        "slo": {"ttft": config.slo_ttft, "e2e": config.slo_e2e},
        "price_per_hour": config.price,
        "devices": config.devices,
        "sweep": sweep,
    }


async def _offer(session: aiohttp.ClientSession, urls: list[str], rate: float, config: LoadConfig) -> dict:
    """Send requests at one rate; return the measures of their answers."""
    draw, tasks = random.Random(config.seed), []
    start = due = time.monotonic()
    while (due := due + draw.expovariate(rate)) < start + config.seconds:
        # by the clock, not after the last request: a late start of this client counts as waiting
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(_request(session, draw.choice(urls), config.max_tokens, due)))
    requests = await asyncio.gather(*tasks)
    seconds = time.monotonic() - start
    answered = [r for r in requests if r.status == "200" and r.pieces]
    good = [r for r in answered if r.pieces[0] <= config.slo_ttft and r.end <= config.slo_e2e]
    values = {name: sorted(v for r in answered for v in r.measures[name]) for name in MEASURES}
    statuses = [r.status for r in requests]
    rates = {"answered_per_second": len(answered) / seconds, "goodput_per_second": len(good) / seconds}
    rates["tokens_per_second_per_device"] = sum(r.tokens for r in answered) / seconds / config.devices
    cost = config.price / 3600 * 1000 / rates["answered_per_second"] if answered else None
    return {
        "offered_per_second": rate,
        "requests": len(requests),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        **{name: round(value, 3) for name, value in rates.items()},
        "cost_per_1000": cost and round(cost, 4),
        **{name: quantiles(values[name]) for name in MEASURES},
    }


async def _request(session: aiohttp.ClientSession, url: str, max_tokens: int, due: float | None = None) -> Request:
    """Stream one caption; its times count from `due` (now)."""
    due, request = due or time.monotonic(), Request()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "raw": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post("/v1/chat/completions", json=body) as answer:
            request.status = str(answer.status)
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    request.status = event["error"]["code"]
                elif event.get("usage"):
                    request.tokens = event["usage"]["completion_tokens"]
                elif event["choices"][0]["delta"].get("content"):
                    request.pieces.append(time.monotonic() - due)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        request.status = type(error).__name__
    request.end = time.monotonic() - due
    return request


def quantiles(values: list[float]) -> dict[str, float | None]:
    """Return p50, p90 and p99 of sorted values, by the nearest rank."""
    ranks = {f"p{q}": -(-len(values) * q // 100) - 1 for q in (50, 90, 99)}
    return {name: round(values[rank], 4) if values else None for name, rank in ranks.items()}


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
