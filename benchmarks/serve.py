"""The server against the batch pipeline: its throughput, and what HTTP adds to a request; in one run, on one engine.

    python -m benchmarks.serve                                    # into benchmarks/serve.json
    python -m benchmarks.serve --images 128 --engine transformers -o /tmp/try.json

Pipeline, server and the direct calls share one language model in this process; the clients are processes of their
own, on the same cores. Clients send one image a request, and then several, as those with many images would.
Captions are compared before speed is. On a GPU at full size: benchmarks/gpu/serve.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.machine import describe
from benchmarks.serve_fuzz import scene
from vlv.common.command import command_line

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3  # of each measurement, in turns: the machine's other load hits all alike
IN_FLIGHT = 256  # captions written together: the default of pipeline and server
WAITING = 320  # images sent at a time, which saturate the server
FILES = 16  # images a request of the second kind
SINGLE = 40  # requests one after the other, for what HTTP adds
SHORT = 8  # tokens of these: what HTTP adds does not grow with the caption, whose own noise would hide it


def main() -> None:
    """Measure, compare, write."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR")
    p.add_argument("--engine", default="vllm")
    p.add_argument("--images", type=int, default=512, help="held-out scenes (512)")
    p.add_argument("--max-tokens", type=int, default=300)
    p.add_argument("--client", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    p.add_argument("--at-once", type=int, default=1, help=argparse.SUPPRESS)
    p.add_argument("--files", type=int, default=1, help=argparse.SUPPRESS)
    p.add_argument("-o", "--output", default=str(ROOT / "benchmarks" / "serve.json"), metavar="JSON")
    args = p.parse_args()
    if args.client:
        print(json.dumps(uvloop.run(client(*args.client, args))))
        return
    report = {
        "command": command_line("benchmarks.serve"),
        **describe(),
        **uvloop.run(measure(args)),
    }
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


async def client(url: str, folder: str, args) -> dict:
    """Ask for every image, `at_once` requests of `files` at a time: seconds in all, each request's, the captions."""
    import aiohttp

    gate, captions, each = asyncio.Semaphore(args.at_once), {}, []

    async def ask(session, files: list[Path]) -> None:
        async with gate:
            form = aiohttp.FormData({"max_tokens": str(args.max_tokens)})
            for file in files:
                form.add_field("file", file.read_bytes(), filename=file.name)
            start = time.perf_counter()
            async with session.post("/v1/captions", data=form) as answer:
                results = (await answer.json())["captions"]
            each.append(time.perf_counter() - start)
            captions.update((file.name, result["caption"]) for file, result in zip(files, results, strict=True))

    files = sorted(Path(folder).iterdir())[: args.images]
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await ask(session, files[:1])
        each.clear()
        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask(session, files[i : i + args.files]) for i in range(0, len(files), args.files)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "each": each, "captions": captions}


async def measure(args) -> dict:
    """The three, in turns."""
    import uvicorn

    from serve.core.inputs import expand
    from serve.core.run import CaptionRun, RunConfig
    from serve.core.service import ServiceConfig
    from serve.engines.base import LLMSpec, Sampling
    from serve.engines.factory import engine_class
    from serve.http.admission import Admission
    from serve.http.app import Bounds
    from serve.http.auth import Keys
    from serve.http.fetch import Fetcher
    from serve.http.routes import Routes
    from serve.http.service import Service
    from serve.outputs.jsonl import FileSink
    from serve.reports.progress import Progress
    from vlv.checkpoints.folder import Checkpoint
    from vlv.model.clean_up import clean_caption

    checkpoint, cls = Checkpoint.open(args.ckpt), engine_class(args.engine)
    spec = LLMSpec.of(checkpoint)
    args.max_tokens = spec.max_tokens(args.max_tokens)

    class Kept(cls):
        """An engine that a pipeline neither starts nor closes."""

        async def start(self):
            if not getattr(self, "begun", False):
                self.begun = True
                await super().start()

        async def close(self):
            pass

    engine = Kept(spec, args.max_tokens, IN_FLIGHT)
    service = Service(checkpoint, lambda: engine, ServiceConfig())
    routes = Routes(service, "model", Keys(), Admission(10_000), Fetcher(), Bounds(deadline=600))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(routes.app(), port=port, log_level="error"))
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for i in range(args.images):
            (images / f"{i:05}.png").write_bytes(scene(i))
        await service.start()
        serving = asyncio.create_task(server.serve())
        while not service.ready:
            await asyncio.sleep(0.2)

        async def pipeline(number: int) -> tuple[float, dict[str, str]]:
            output = Path(folder) / f"{number}.jsonl"
            sink, config = FileSink(output, checkpoint.hash), RunConfig(Sampling(args.max_tokens))
            start = time.perf_counter()
            await CaptionRun(checkpoint, engine, sink, config, Progress()).run(expand([str(images)]))
            seconds = time.perf_counter() - start
            sink.close()
            records = map(json.loads, output.read_text().splitlines())
            return seconds, {Path(r["id"]).name: r["caption"] for r in records}

        async def ask(count: int, at_once: int, tokens: int = args.max_tokens, files: int = 1) -> dict:
            command = [sys.executable, "-m", "benchmarks.serve", "--client", f"http://127.0.0.1:{port}", str(images)]
            for flag, value in {"images": count, "at-once": at_once, "max-tokens": tokens, "files": files}.items():
                command += [f"--{flag}", str(value)]
            run = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
            stdout, _ = await run.communicate()
            return json.loads(stdout)

        async def direct(count: int) -> list[float]:
            seconds = []
            for i in range(count):
                content, start = (images / f"{i:05}.png").read_bytes(), time.perf_counter()
                clean_caption((await service.caption(await service.embed(content), Sampling(SHORT))).text)
                seconds.append(time.perf_counter() - start)
            return seconds

        await pipeline(0)  # warm-up
        rounds, alone, by_http = {"pipeline": [], "server": [], "server_batches": []}, [], []
        for number in range(1, ROUNDS + 1):
            seconds, expected = await pipeline(number)
            answers = {
                "server": await ask(args.images, WAITING),
                "server_batches": await ask(args.images, WAITING // FILES, files=FILES),
            }
            took = {"pipeline": seconds, **{name: answer["seconds"] for name, answer in answers.items()}}
            for name, value in took.items():
                rounds[name].append(round(args.images / value, 2))
            alone += await direct(SINGLE)
            by_http += (await ask(SINGLE, 1, SHORT))["each"]
        server.should_exit = True
        await serving
        await service.close()
        await cls.close(engine)
    pace = {name: statistics.median(values) for name, values in rounds.items()}
    added = statistics.median(by_http) - statistics.median(alone)
    return {
        "engine": args.engine,
        "checkpoint": {"folder": Path(args.ckpt).name, "hash": checkpoint.hash},
        "images": args.images,
        "captions_equal": {name: f"{_equal(a['captions'], expected)}/{len(expected)}" for name, a in answers.items()},
        "pictures_waiting": WAITING,
        "files_a_request": {"server": 1, "server_batches": FILES},
        "images_per_second": pace,
        "server_to_pipeline": round(pace["server"] / pace["pipeline"], 3),
        "server_batches_to_pipeline": round(pace["server_batches"] / pace["pipeline"], 3),
        "client_cpu_ms_per_image": {n: round(1000 * a["cpu"] / args.images, 2) for n, a in answers.items()},
        "rounds": rounds,
        "tokens_of_single_requests": SHORT,
        "direct_p50_ms": round(1000 * statistics.median(alone), 2),
        "http_p50_ms": round(1000 * statistics.median(by_http), 2),
        "http_adds_ms": round(1000 * added, 2),
    }


def _equal(found: dict[str, str], expected: dict[str, str]) -> int:
    return sum(found.get(name) == text for name, text in expected.items())


if __name__ == "__main__":
    main()
