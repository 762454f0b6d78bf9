"""What training reads from an object store: bytes fetched over bytes of images, requests, and images a second.

    git worktree add ../before edb08ac
    python -m benchmarks.data_reading --before ../before --clouds --out benchmarks/data_reading.json

A local HTTP server serves ranges, counts requests and bytes, answers after --latency milliseconds and sends --rate MB
a second over a connection, about what object stores do. The data:
--rows JPEG files with captions, as WebDataset tars, as Parquet files in row groups of 100, and as single files. One
epoch with shuffling through the loader, each in a process of its own with an empty cache; for tars and Parquet the
indexing before is counted by itself. --before measures an earlier version on the same server over --before-rows rows.
The order is checked as well: every image once an epoch, and the longest run of rows that are neighbours in a shard.
--clouds reads the tars and Parquet files from emulators of S3 and Google Cloud Storage as well, by their own clients;
their bytes are counted on the connection, HTTP's headers of about 500 bytes an answer included.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.clouds import Cloud
from vlv.common.command import Parser, UserError, command_line, positive, run_command, say
from vlv.common.files import write_json

TARGETS = {"tar": 1.1, "parquet": 1.5}  # bytes fetched over bytes of images and captions, indexing included
SPEEDUP = 10.0  # of the loader on the HTTP tars
GROUP = 100  # rows of a Parquet row group
SIDE = 256  # pixels of the images; as noise they are JPEG files of about 50 KB
MICRO_BATCH = 16
NOW = """
import json, sys, time
from vlv.data.loader import TrainingImages, batches
from vlv.data.sources import open_sources
settings = json.loads(sys.argv[1])
start = time.perf_counter()
source = open_sources(settings["data"])
print(json.dumps({"indexed": time.perf_counter() - start}), flush=True)
sys.stdin.readline()
from vlv.data.selection import Limits
images = TrainingImages(source, 64, limits=Limits(captions=True))
ids, started, size = [], None, settings["micro_batch"]
for batch in batches(images, size, workers=settings["workers"], end=sum(source.rows)):
    started = started or time.perf_counter()
    ids += batch["id"]
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "images": len(ids) - size, "ids": ids, "window": source.window}))
"""
BEFORE = """
import json, sys, time
from dataclasses import replace
from itertools import islice
from vlv.train.loader import Pictures, batches
from vlv.train.paper import TrainConfig
from vlv.train.parallel import World
from vlv.train.sources import open_sources
settings = json.loads(sys.argv[1])
start = time.perf_counter()
source = open_sources(settings["data"])
print(json.dumps({"indexed": time.perf_counter() - start}), flush=True)
sys.stdin.readline()
config = TrainConfig(micro_batch=settings["micro_batch"], workers=settings["workers"])
steps, ids, started = -(-min(sum(source.rows), settings["rows"]) // settings["micro_batch"]), [], None
with World.start("cpu") as world:
    for batch in islice(batches(Pictures(source, config, 64, True), config, world, 0), steps):
        started = started or time.perf_counter()
        ids += batch["id"]
    seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "images": len(ids) - settings["micro_batch"], "ids": ids}))
"""


class QuietServer(ThreadingHTTPServer):
    """Leaves out the traceback of a client that went away."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Serves a folder and counts what it sends.

    The next `failing` requests are answered with an error of the server; without `ranges`, all of a file is sent.
    A connection sends at most `rate` bytes a second, without limit if 0.
    """

    def __init__(self, folder: Path, latency: float = 0.0, ranges: bool = True, rate: float = 0.0):
        self.requests = self.bytes = self.failing = 0
        counts, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer waits for the client's delayed acknowledgement

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                time.sleep(latency)
                file = folder / self.path.lstrip("/")
                if not file.is_file() or counts.failing:
                    self.send_response(503 if counts.failing else 404)
                    counts.failing = max(0, counts.failing - 1)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                size = file.stat().st_size
                start, end, asked = 0, size, self.headers.get("Range") if ranges else None
                if asked:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(size, int(last) + 1 if last else size)
                self.send_response(206 if asked else 200)
                if ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{size}"')
                self.send_header("Content-Length", str(end - start))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                self.end_headers()
                with lock:
                    counts.requests += 1
                    counts.bytes += end - start if body else 0
                if body:
                    with file.open("rb") as stream:
                        stream.seek(start)
                        left, began = end - start, time.monotonic()
                        while left:
                            part = stream.read(min(left, 1 << 18))
                            self.wfile.write(part)
                            left -= len(part)
                            if rate:
                                time.sleep(max(0.0, began + (end - start - left) / rate - time.monotonic()))

            def log_message(self, *_) -> None:
                pass

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        found = {"requests": self.requests, "bytes": self.bytes}
        self.requests = self.bytes = 0
        return found


def make_data(folder: Path, rows: int, shards: int) -> int:
    """Write the same rows as files, tars and Parquet files; return the bytes of images and captions."""
    import numpy as np
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    rng, size, data = np.random.default_rng(0), 0, []
    (folder / "files").mkdir()
    for i in range(rows):
        buffer = io.BytesIO()
        noise = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG", quality=75)
        caption = f"Image number {i}, of noise, with a caption that is about as long as a sentence."
        data.append((f"{i:06}", buffer.getvalue(), caption))
        size += len(buffer.getvalue()) + len(caption)
    per = -(-rows // shards)
    lines = []
    for shard in range(shards):
        part = data[shard * per : (shard + 1) * per]
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for name, image, caption in part:
                for suffix, content in (("jpg", image), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        columns = {"image": [i for _, i, _ in part], "caption": [c for *_, c in part], "id": [n for n, *_ in part]}
        parquet.write_table(pyarrow.table(columns), folder / f"{shard:03}.parquet", row_group_size=GROUP)
    for name, image, caption in data:
        (folder / "files" / f"{name}.jpg").write_bytes(image)
        lines.append({"id": name, "path": f"files/{name}.jpg", "caption": caption})
    (folder / "files.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return size


def measure(program: str, checkout: Path, data: list[str], server: Server | Cloud, rows: int, workers: int) -> dict:
    """Run a loader over an epoch in a process of its own, with an empty cache; return its counts and rates."""
    settings = {"data": data, "rows": rows, "workers": workers, "micro_batch": MICRO_BATCH}
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": cache}
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(settings)], cwd=cache, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        server.take()
        first = process.stdout.readline()
        indexing = server.take()
        out, err = process.communicate("go\n")
        if process.returncode:
            raise UserError(f"the code in {checkout} failed: {(err.strip().splitlines() or ['no message'])[-1]}")
        found = json.loads(out)
    return {
        "index": indexing | {"seconds": round(json.loads(first)["indexed"], 2)}, "epoch": server.take(),
        "images_per_second": round(found["images"] / found["seconds"], 1), "ids": found["ids"],
        "window": found.get("window"),
    }  # fmt: skip


def longest_run(ids: list[str]) -> int:
    """Return how many rows at most follow one another in the data as they do in the epoch."""
    numbers = [int(id[-6:].split(":")[-1]) if id[-6:].isdigit() else int(id.rpartition("/")[2]) for id in ids]
    longest = run = 1
    for a, b in itertools.pairwise(numbers):
        run = run + 1 if b == a + 1 else 1
        longest = max(longest, run)
    return longest


def work(args: argparse.Namespace) -> int:
    import fsspec

    from benchmarks import clouds, machine

    if args.clouds and any(map(clouds.missing, clouds.CLIENTS)):
        raise UserError(f"--clouds needs packages that are not installed: {clouds.INSTALL}")

    report = {
        "command": command_line("benchmarks.data_reading"), "kind": "data_reading", "machine": machine.describe(),
        "settings": {n: getattr(args, n) for n in ("rows", "shards", "workers", "latency", "rate", "before_rows")},
        "targets": TARGETS | {"speedup": SPEEDUP}, "now": {}, "before": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_data(folder, args.rows, args.shards)
        report["settings"]["bytes_of_images_and_captions"] = size
        server = Server(folder, args.latency / 1000, rate=args.rate * 1e6)
        kinds = {
            "tar": [f"{server.url}/{i:03}.tar" for i in range(args.shards)],
            "parquet": [f"{server.url}/{i:03}.parquet" for i in range(args.shards)],
            "local parquet": [str(folder / f"{i:03}.parquet") for i in range(args.shards)],
            "files": [str(_urls(folder, server.url))],
        }
        here = Path(__file__).resolve().parents[1]

        def measure_now(kind: str, data: list[str], server: Server | Cloud) -> None:
            found = measure(NOW, here, data, server, args.rows, args.workers)
            ids = found.pop("ids")[: args.rows]
            found["every_image_once"] = len(set(ids)) == args.rows
            found["longest_run_of_neighbours"] = longest_run(ids)
            found["bytes_over_data"] = round((found["index"]["bytes"] + found["epoch"]["bytes"]) / size, 3)
            report["now"][kind] = found
            say(f"{kind}: {json.dumps(found)}")
            if args.out:
                write_json(args.out, report, 1)

        for kind, data in kinds.items():
            measure_now(kind, data, server)
        for cloud_kind in clouds.CLIENTS if args.clouds else ():
            with clouds.emulator(cloud_kind) as cloud:
                for suffix in TARGETS:
                    urls = [f"{cloud.bucket}/{i:03}.{suffix}" for i in range(args.shards)]
                    for url in urls:
                        with fsspec.open(url, "wb") as file:
                            file.write((folder / url.rpartition("/")[2]).read_bytes())
                    measure_now(f"{suffix} on {cloud_kind}", urls, cloud)
        for kind in ("tar", "parquet", "local parquet") if args.before else ():
            found = measure(BEFORE, args.before, kinds[kind], server, args.before_rows, args.workers)
            read = len(found.pop("ids")) / args.rows * size
            found["epoch_bytes_over_data"] = round(found["epoch"]["bytes"] / read, 1)
            report["before"][kind] = found
            say(f"before, {kind}: {json.dumps(found)}")
        server.http.shutdown()
    now = report["now"]
    met = all(now[kind]["bytes_over_data"] <= target for kind, target in TARGETS.items())
    met = met and all(found["every_image_once"] for found in now.values())
    if args.before:
        report["speedup"] = now["tar"]["images_per_second"] / report["before"]["tar"]["images_per_second"]
        met = met and report["speedup"] >= SPEEDUP
    report["met"] = met
    if args.out:
        write_json(args.out, report, 1)
    print(json.dumps({k: v["bytes_over_data"] for k, v in now.items()} | {"speedup": report.get("speedup")}))
    return 0 if met else 1


def _urls(folder: Path, url: str) -> Path:
    """Return JSON lines whose paths are URLs."""
    lines = [json.loads(line) for line in (folder / "files.jsonl").read_text().splitlines()]
    remote = folder / "remote.jsonl"
    remote.write_text("".join(json.dumps(line | {"path": f"{url}/{line['path']}"}) + "\n" for line in lines))
    return remote


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = Parser(prog="python -m benchmarks.data_reading", description=__doc__)
    p.add_argument("--rows", type=positive, default=1200, help="images (1200)")
    p.add_argument("--shards", type=positive, default=4, help="tars, and Parquet files (4)")
    p.add_argument("--workers", type=positive, default=2, help="processes of the loader (2)")
    p.add_argument("--latency", type=float, default=5, help="milliseconds before the server answers (5)")
    p.add_argument("--rate", type=float, default=90, help="MB a second of a connection; 0: no limit (90, as S3's)")
    p.add_argument("--before", type=Path, metavar="DIR", help="checkout of an earlier version, to compare with")
    p.add_argument("--before-rows", type=positive, default=96, help="rows that it reads (96)")
    p.add_argument("--clouds", action="store_true", help="read from emulators of S3 and Google Cloud Storage as well")
    p.add_argument("--out", type=Path, help="JSON file of the figures")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(work, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
