"""Test a captioning server under overload, with invalid requests, and while its processes are killed.

    python -m benchmarks.serve_faults                        # everything, into benchmarks/serve_faults.json (40 min)
    python -m benchmarks.serve_faults --parts fuzz_images,fuzz_requests --fuzz 500 --engine transformers -o try.json

Parts: `fuzz_images`, `fuzz_requests` send mutated files and requests; `slow` clients that never finish; `workers` and
`engine` kill processes; `burst` sends 500 requests at once; `soak` offers 1.5 times the capacity. Each ends with a
valid request, answered as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from benchmarks.machine import describe
from benchmarks.serve_fuzz import fuzzed_images, fuzzed_requests, scene
from vlv.common.command import command_line

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("fuzz_images", "fuzz_requests", "slow", "workers", "engine", "burst", "soak")
BURST = 500  # requests at once
ALLOWED = {200, 400, 401, 404, 405, 408, 413, 422, 429, 431, 503}  # answers to invalid requests and to overload
DEADLINE = 30  # seconds, the server's for a request
SATURATING = 320  # requests at a time: more than the engine decodes together, fewer than are refused
BY_UVICORN = "Invalid HTTP request received."  # a head that is no HTTP does not reach the application


def main() -> None:
    """Start a server, run the parts against it, and write the results as JSON; exit code 1 if a part failed."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR")
    p.add_argument("--engine", default="vllm", help="vllm or transformers (which has no process to kill)")
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--fuzz", type=int, default=10_000, metavar="N", help="mutated files, and requests (10000)")
    p.add_argument("--minutes", type=float, default=30, help="of the soak (30)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-o", "--output", default=str(ROOT / "benchmarks" / "serve_faults.json"), metavar="JSON")
    args = p.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        p.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    report = {
        "command": command_line("benchmarks.serve_faults"),
        **describe(),
        "parts": {},
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--engine", args.engine, "--port", str(port), "--deadline", str(DEADLINE), "--body-seconds", "5"]
    command = [sys.executable, "-m", "serve.server", "--ckpt", args.ckpt, *flags]
    log = ROOT / "out" / f"{Path(args.output).stem}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stderr, subprocess.Popen(command, cwd=ROOT, stderr=stderr) as server:
        try:
            asyncio.run(_run(parts, args, f"http://127.0.0.1:{port}", server.pid, report))
            server.terminate()
            report["exit_code"] = server.wait(60)
        finally:
            server.kill()
    report["tracebacks_in_log"] = log.read_text().count("Traceback")
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    sys.exit(not all(part["passed"] for part in report["parts"].values()))


async def _run(parts: list[str], args, url: str, pid: int, report: dict) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await until_ready(client)
        expected = (await caption(client, scene(0))).json()
        for part in parts:
            print(f"faults: {part}", file=sys.stderr, flush=True)
            figures = await _PART[part](client, args, pid)
            await until_ready(client)
            figures["sound_after"] = (await caption(client, scene(0))).json() == expected
            figures["passed"] = figures["passed"] and figures["sound_after"]
            report["parts"][part] = figures
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n")  # a run may be cut short
            print(json.dumps({part: figures}), file=sys.stderr, flush=True)


async def send_all(client: httpx.AsyncClient, requests: list[dict], at_once: int = 16) -> dict:
    """Send them; count the answers, and those that should not be: 5xx but 503, tracebacks, hangs, no JSON."""
    gate, counts, wrong = asyncio.Semaphore(at_once), Counter(), []

    async def one(request: dict) -> None:
        async with gate:
            try:
                answer = await client.post(**request)
            except httpx.HTTPError as error:
                counts[type(error).__name__] += 1
                wrong.append(f"{type(error).__name__} on {request['url']}")
                return
        counts[answer.status_code] += 1
        sound = answer.text == BY_UVICORN or answer.headers.get("content-type", "").startswith(
            ("application/json", "text/event-stream")
        )
        if answer.status_code not in ALLOWED or "Traceback" in answer.text or not sound:
            wrong.append(f"{answer.status_code} on {request['url']}: {answer.text[:200]}")

    await asyncio.gather(*map(one, requests))
    return {"sent": len(requests), "answers": {str(k): v for k, v in counts.items()}, "wrong": wrong[:20]}


async def fuzz_images(client: httpx.AsyncClient, args, pid: int) -> dict:
    """Mutated image files, eight a request; each has a caption or one sentence."""
    files, parts = fuzzed_images(args.fuzz, args.seed), []
    for i in range(0, len(files), 8):
        parts.append(
            {"url": "/v1/captions", "files": [("file", f) for f in files[i : i + 8]], "data": {"max_tokens": 4}}
        )
    figures = await send_all(client, parts, at_once=4)
    return {**figures, "images": len(files), "passed": not figures["wrong"]}


async def fuzz_requests(client: httpx.AsyncClient, args, pid: int) -> dict:
    """Mutated requests; each has an answer that a client can read."""
    figures = await send_all(client, fuzzed_requests(args.fuzz, args.seed))
    return {**figures, "passed": not figures["wrong"]}


async def slow(client: httpx.AsyncClient, args, pid: int) -> dict:
    """200 connections that send a byte a second: sound requests beside them, and how long they are put up with."""
    host, port = client.base_url.host, client.base_url.port
    writers, closed = [], []

    async def loris(head: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writers.append(writer)
        start = time.monotonic()
        try:
            writer.write(head)
            while not reader.at_eof() and time.monotonic() - start < 60:
                writer.write(b"x")
                await writer.drain()
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(reader.read(4096))), 1)
        except (OSError, TimeoutError, RuntimeError):
            pass
        closed.append(time.monotonic() - start)

    body = b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    tasks = [asyncio.create_task(loris(body if i % 2 else b"GET /health HTTP/1.1\r\nX-Slow: ")) for i in range(200)]
    await asyncio.sleep(1)
    answers = [(await caption(client, scene(i))).status_code for i in range(10)]
    await asyncio.wait(tasks, timeout=90)
    for writer in writers:
        writer.close()
    return {"answers_beside": dict(Counter(map(str, answers))), "passed": set(answers) <= {200, 503} and 200 in answers}


async def workers(client: httpx.AsyncClient, args, pid: int) -> dict:
    """Each decode process killed under load: at most the images in it fail, and a new one takes its place."""
    import psutil

    load = asyncio.create_task(_steadily(client, 100))
    await asyncio.sleep(1)
    killed = [p for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    killed = [p for p in killed if p.memory_info().rss < 150 << 20]  # the decoders; the engine is larger
    for process in killed:
        process.kill()
    counts = await load
    return {"killed": len(killed), "answers": counts, "passed": bool(killed) and set(counts) <= {"200", "503"}}


async def engine(client: httpx.AsyncClient, args, pid: int) -> dict:
    """vLLM's engine process killed: not ready meanwhile, requests refused with 503, then as before."""
    import psutil

    if args.engine != "vllm":
        return {"skipped": "only vLLM has a process of its own", "passed": True}
    load = asyncio.create_task(_steadily(client, 60))
    await asyncio.sleep(1)
    largest = max(psutil.Process(pid).children(recursive=True), key=lambda p: p.memory_info().rss)
    largest.kill()
    start, states = time.monotonic(), []
    while states[-1:] != [200] or 503 not in states:
        states.append((await client.get("/ready")).status_code)
        if time.monotonic() - start > 180:
            break
        await asyncio.sleep(0.2)
    counts = await load
    back = time.monotonic() - start
    passed = states[-1] == 200 and 503 in states and set(counts) <= {"200", "503"}
    return {"seconds_until_ready": round(back, 1), "answers": counts, "passed": passed}


async def burst(client: httpx.AsyncClient, args, pid: int) -> dict:
    """Send BURST requests at once, twice: all can be finished within the deadline, so that all must be answered."""
    import aiohttp

    image, rounds = scene(4), []

    async def ask(session: aiohttp.ClientSession) -> str:
        form = aiohttp.FormData({"max_tokens": "40"})
        form.add_field("file", image, filename="a.png")
        async with session.post("/v1/captions", data=form) as answer:
            await answer.read()
            return str(answer.status)

    async with aiohttp.ClientSession(str(client.base_url), connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(2):
            start = time.monotonic()
            answers = Counter(await asyncio.gather(*(ask(session) for _ in range(BURST))))
            rounds.append({"answers": dict(answers), "seconds": round(time.monotonic() - start, 2)})
    return {"requests": BURST, "rounds": rounds, "passed": all(r["answers"] == {"200": BURST} for r in rounds)}


async def soak(client: httpx.AsyncClient, args, pid: int) -> dict:
    """Poisson arrivals at 1.5 x the measured capacity: memory, latencies of what was accepted, and refusals."""
    import aiohttp  # a quarter of httpx' work for a request: the client shares the server's cores
    import psutil

    image, counts, seconds, unhelpful = scene(3), Counter(), [], 0

    async def ask(session: aiohttp.ClientSession) -> None:
        nonlocal unhelpful
        form = aiohttp.FormData({"max_tokens": "40"})
        form.add_field("file", image, filename="a.png")
        start = time.monotonic()
        try:
            async with session.post("/v1/captions", data=form) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            counts[type(error).__name__] += 1
            return
        counts[str(answer.status)] += 1
        if answer.status == 200:
            seconds.append(time.monotonic() - start)
        elif "Retry-After" not in answer.headers:
            unhelpful += 1

    async def closed_loop(session: aiohttp.ClientSession, count: int) -> None:
        for _ in range(count):
            await ask(session)

    sizes, tasks, family, rng = [], set(), psutil.Process(pid), random.Random(args.seed)
    async with aiohttp.ClientSession(str(client.base_url), connector=aiohttp.TCPConnector(limit=0)) as session:
        for count in (1, 6):  # the first is the warm-up; both saturate the server
            start = time.monotonic()
            await asyncio.gather(*(closed_loop(session, count) for _ in range(SATURATING)))
        capacity = SATURATING * count / (time.monotonic() - start)
        counts.clear()
        seconds.clear()
        end = (due := time.monotonic()) + 60 * args.minutes
        sampled = 0.0
        while (now := time.monotonic()) < end:
            task = asyncio.create_task(ask(session))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if now - sampled > 1:
                sampled = now
                sizes.append(sum(p.memory_info().rss for p in [family, *family.children(recursive=True)]) / 2**20)
            due += rng.expovariate(1.5 * capacity)  # open loop: a late request does not put off the next
            await asyncio.sleep(max(0, due - time.monotonic()))
        await asyncio.gather(*tasks)
    early, late = (
        statistics.mean(sizes[int(a * len(sizes)) : int(b * len(sizes)) or None]) for a, b in ((0.1, 0.3), (0.8, 1))
    )
    p99 = statistics.quantiles(seconds, n=100)[98]
    return {
        "minutes": args.minutes,
        "capacity_per_second": round(capacity, 1),
        "offered_per_second": round(sum(counts.values()) / (60 * args.minutes), 1),
        "answers": dict(counts),
        "refused_without_retry_after": unhelpful,
        "p99_seconds": round(p99, 2),
        "early_mib": round(early, 1),
        "late_mib": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
        "passed": p99 < DEADLINE and late < 1.05 * early and not unhelpful and set(counts) <= {"200", "429", "503"},
    }


async def _steadily(client: httpx.AsyncClient, count: int) -> dict[str, int]:
    """One request after the other."""
    counts = Counter()
    for i in range(count):
        counts[str((await caption(client, scene(i % 8))).status_code)] += 1
        await asyncio.sleep(0.02)
    return dict(counts)


async def caption(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    """Ask for one caption."""
    return await client.post("/v1/captions", files={"file": ("a.png", content)}, data={"max_tokens": 40})


async def until_ready(client: httpx.AsyncClient, seconds: float = 300) -> None:
    """Wait for /ready."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"faults: the server is not ready after {seconds:.0f} s")
        await asyncio.sleep(0.2)


_PART = {
    "fuzz_images": fuzz_images,
    "fuzz_requests": fuzz_requests,
    "slow": slow,
    "workers": workers,
    "engine": engine,
    "burst": burst,
    "soak": soak,
}

if __name__ == "__main__":
    main()
