"""What a server sustains: python -m serve.bench PATH... --url http://127.0.0.1:8000 --rates 2,4,8 -o bench.json

Open loop: requests arrive by a Poisson process at each offered rate whether or not earlier ones are answered, so a
server that falls behind shows it. Every request is a streamed chat completion of one picture. Written are the time
to the first token (TTFT), per further token (TPOT), between pieces (ITL) and to the end (e2e), their p50, p90 and
p99, the goodput (answers a second that kept the SLO) and the cost of 1,000 captions; as JSON, and as one page.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from serve.reports.bench_page import page
from vlv.common.command import Misuse, Parser, command_line, debug_argument, positive, run_command, say

MEASURES = ("ttft", "tpot", "itl", "e2e")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m serve.bench",
        description="Measure a captioning server under offered load.",
        parents=[debug_argument()],
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="pictures to ask for: files, folders, globs")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    p.add_argument("--rates", type=_rates, default=(1.0, 2.0, 4.0), metavar="R,R", help="requests a second (1,2,4)")
    p.add_argument("--seconds", type=positive, default=30, metavar="S", help="of arrivals at each rate (30)")
    p.add_argument("--max-tokens", type=positive, default=300, metavar="N", help="longest caption (300)")
    p.add_argument("--slo-ttft", type=float, default=1.0, metavar="S", help="SLO: seconds to the first token (1)")
    p.add_argument("--slo-e2e", type=float, default=10.0, metavar="S", help="SLO: seconds to the end (10)")
    p.add_argument("--price", type=float, default=0.0, metavar="P", help="of the server an hour, for the cost")
    p.add_argument("--devices", type=positive, default=1, metavar="N", help="that the server runs on, for its figures")
    p.add_argument("--seed", type=int, default=0, help="of the arrivals (0)")
    p.add_argument("-o", "--output", default="bench.json", metavar="JSON", help="figures; the page is NAME.html")
    return p


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
        if all(0 < rate < 1e6 for rate in rates):
            return rates
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no list of rates above 0, such as 2,4,8")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_bench, parser().parse_args(argv))


def _bench(args: argparse.Namespace) -> int:
    report = asyncio.run(measure(args))
    output = Path(args.output)
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".html").write_text(page(report))
    say(f"written: {output} and {output.with_suffix('.html')}")
    return 0


@dataclass
class Request:
    """One request's times, in seconds since it was due."""

    status: str = "pending"
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    tokens: int = 0
    end: float = 0.0

    @property
    def measures(self) -> dict[str, list[float]]:
        """What it adds to each of MEASURES."""
        first, steps = self.pieces[0], max(self.tokens - 1, 1)
        gaps = [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]
        return {"ttft": [first], "tpot": [(self.pieces[-1] - first) / steps], "itl": gaps, "e2e": [self.end]}


async def measure(args: argparse.Namespace) -> dict:
    """The whole sweep. Raises Misuse where no server answers."""
    import aiohttp

    from serve.core.inputs import expand

    urls = [_data_url(item.read()) for item, _ in zip(expand(args.paths), range(256), strict=False)]
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("VLV_API_KEY")) else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(args.url, connector=connector, timeout=timeout, headers=headers) as session:
        try:
            async with session.get("/v1/models") as answer:
                model = (await answer.json())["data"][0]["id"]
        except (aiohttp.ClientError, OSError, LookupError, ValueError, TypeError) as error:
            raise Misuse(f"--url: no captioning server answers at {args.url} ({type(error).__name__})") from error
        await asyncio.gather(*(_ask(session, url, 8) for url in urls[:8]))  # warm-up
        sweep = []
        for rate in args.rates:
            point = await _offer(session, urls, rate, args)
            sweep.append(point)
            say(f"{rate:g}/s offered: {point['answered_per_second']}/s answered, e2e p99 {point['e2e']['p99']} s")
    return {
        "command": command_line("serve.bench"),
        "model": model,
        "seconds": args.seconds,
        "max_tokens": args.max_tokens,
        "slo": {"ttft": args.slo_ttft, "e2e": args.slo_e2e},
        "price_per_hour": args.price,
        "devices": args.devices,
        "sweep": sweep,
    }


async def _offer(session, urls: list[str], rate: float, args: argparse.Namespace) -> dict:
    """Arrivals at one rate, and what became of them."""
    draw, requests, tasks = random.Random(args.seed), [], []
    start = due = time.monotonic()
    while (due := due + draw.expovariate(rate)) < start + args.seconds:
        # against the clock and not after the last one: a late start of this client counts as waiting
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(_ask(session, draw.choice(urls), args.max_tokens, due)))
    requests = await asyncio.gather(*tasks)
    seconds = time.monotonic() - start
    answered = [r for r in requests if r.status == "200" and r.pieces]
    kept = [r for r in answered if r.pieces[0] <= args.slo_ttft and r.end <= args.slo_e2e]
    values = {name: sorted(v for r in answered for v in r.measures[name]) for name in MEASURES}
    statuses = [r.status for r in requests]
    rates = {"answered_per_second": len(answered) / seconds, "goodput_per_second": len(kept) / args.seconds}
    rates["tokens_per_second_per_device"] = sum(r.tokens for r in answered) / seconds / args.devices
    cost = args.price / 3600 * 1000 / rates["answered_per_second"] if answered else None
    return {
        "offered_per_second": rate,
        "requests": len(requests),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        **{name: round(value, 3) for name, value in rates.items()},
        "cost_per_1000": cost and round(cost, 4),
        **{name: quantiles(values[name]) for name in MEASURES},
    }


async def _ask(session, url: str, max_tokens: int, due: float | None = None) -> Request:
    """One streamed caption; times count from when it was due."""
    import aiohttp

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
    """p50, p90 and p99 of sorted values (nearest rank)."""
    ranks = {f"p{q}": -(-len(values) * q // 100) - 1 for q in (50, 90, 99)}
    return {name: round(values[rank], 4) if values else None for name, rank in ranks.items()}


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


if __name__ == "__main__":
    sys.exit(main())
