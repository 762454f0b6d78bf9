"""What the CPU side of one node can feed: decoding, the pipeline's main process and HTTP, without any model.

    python -m benchmarks.host                          # into benchmarks/host.json

Encoder and language model are stand-ins that compute nothing: every image gets zeros as embeddings, after the time that
an H200 takes for its batch, and the same 220 tokens, which are decoded to text as ever. Measured is CPU time: of
`load_crop` for one file in one process, and of the main process of the batch pipeline and of the server for one image,
with decoding in processes of its own and the server's clients in another. Every crop that reaches the encoder is
compared with load_crop's, byte for byte. From these come the cores that a GPU needs at a rate of captions.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import uvloop

import serve.core.service
from benchmarks.gpu.serve import DISTINCT, scene_jpeg, write_images
from benchmarks.machine import describe
from serve.core.inputs import expand
from serve.core.run import CaptionRun, RunConfig
from serve.core.service import ServiceConfig
from serve.engines.base import LLMEngine, LLMSpec, Sampling
from serve.outputs.jsonl import FileSink
from serve.reports.progress import Progress
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import command_line
from vlv.common.files import write_json
from vlv.data.image import load_crop, load_crops

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 220
TARGETS = {"pipeline_main_ms": 0.6, "decode_ms": 7.0}  # CPU milliseconds an image of 1024x1024
RATE = 150  # captions a second, for which cores are counted
REPEATS = 3
PHOTOS = ((1024, 1024), (2000, 1500), (4000, 3000), (6000, 4000))  # sizes that are decoded with --fast-jpeg and without
ENCODER_START, ENCODER_IMAGE = 0.0464, 0.0036  # seconds: an H200 takes 50 ms for one image, 163 for 32 (gpu/h200.json)


class StandInEncoder:
    """Return zeros once a GPU would have them; with `checks`, also count the crops by their hashes."""

    spec: LLMSpec
    checks = False
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self, checkpoint: Checkpoint, *_args):
        self.batch = 32

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        if self.checks:
            self.seen.update(digest(image) for image in images)
        time.sleep(ENCODER_START + ENCODER_IMAGE * len(images))  # without it, each image would be a batch of its own
        return torch.zeros(len(images), self.spec.queries, self.spec.width)


class CountingSink(FileSink):
    """Remember the CPU seconds that this process had spent after the first quarter of `count` captions, and at the end.

    Not at each caption: asking takes as much CPU as everything else for one.
    """

    def __init__(self, file: Path, model: str, count: int):
        super().__init__(file, model)
        self._left = count
        self._first = count // 4
        self._count = count - self._first
        self.spent: list[float] = []

    def caption(self, record: dict, item) -> None:
        super().caption(record, item)
        self._left -= 1
        if self._left in (self._count, 0):
            self.spent.append(time.process_time())

    def milliseconds(self) -> float:
        """Return those of one caption, without the start: the first quarter of the captions."""
        first, last = self.spent
        return 1000 * (last - first) / self._count


class StandInEngine(LLMEngine):
    """Return the same tokens for every image, at once."""

    name = "stand-in"

    async def start(self) -> None:
        self._load_tokenizer()

    async def tokens(self, embeds: torch.Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        self.spec.check(embeds)
        await asyncio.sleep(0)
        yield [10 + number % 200 for number in range(TOKENS)]

    async def close(self) -> None:
        pass


def digest(crop: np.ndarray) -> str:
    """Return a hash of an image's bytes."""
    return hashlib.blake2b(crop.tobytes(), digest_size=16).hexdigest()


def main() -> int:
    """Measure and write; exit code 1 where a crop differs or a target is missed."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR", help="for tokenizer and sizes")
    p.add_argument("--crop", type=int, default=384, metavar="S", help="side of a crop (384, as published)")
    p.add_argument("--images", type=int, default=960, help="files of 1024x1024 (960)")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "host.json", metavar="JSON")
    args = p.parse_args()
    report = {"command": command_line("benchmarks.host"), **describe(), "targets": TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images, args.images, 1024)
        report["decode_photos_ms"] = decode_photos(args.crop)
        report |= uvloop.run(measure(Checkpoint.open(args.ckpt), images, args.crop))
    report["missed"] = [name for name, most in TARGETS.items() if report[name] > most]
    busy = RATE * (report["decode_ms"] + report["pipeline_main_ms"]) / 1000
    report[f"cores_for_{RATE}_captions_per_s"] = {
        "decoding": math.ceil(RATE * report["decode_ms"] / 1000),
        "main process": round(RATE * report["pipeline_main_ms"] / 1000, 2),
        "in all": math.ceil(busy),
    }
    write_json(args.output, report)
    print(json.dumps(report, indent=1))
    return int(not report["crops_equal"] or bool(report["missed"]))


def decode_photos(size: int) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds that decoding a JPEG file of each of PHOTOS takes, exactly and with fast_jpeg."""
    found = {}
    for width, height in PHOTOS:
        content = scene_jpeg(0, width, height)
        rounds: dict[str, list[float]] = {"exact": [], "fast_jpeg": []}
        for _ in range(2 * REPEATS):
            for name, spent in rounds.items():
                start = time.process_time()
                load_crops(content, size, fast_jpeg=name == "fast_jpeg")
                spent.append(1000 * (time.process_time() - start))
        found[f"{width}x{height}"] = {name: round(statistics.median(spent), 1) for name, spent in rounds.items()}
    return found


async def measure(checkpoint: Checkpoint, images: Path, size: int) -> dict:
    """Return CPU milliseconds an image of decoding, of the pipeline's main process and of the server's."""
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, image_size=size))
    files = sorted(images.iterdir())
    distinct = files[:DISTINCT]
    decode = []
    for _ in range(REPEATS):
        start = time.process_time()
        crops = [load_crop(file, size) for file in distinct]
        decode.append(1000 * (time.process_time() - start) / len(distinct))
    expected = Counter(digest(crops[number % len(crops)]) for number in range(len(files)))
    StandInEncoder.spec = spec = LLMSpec.of(checkpoint)
    serve.core.service.Encoder = StandInEncoder
    pipeline = []
    for number in range(REPEATS + 1):
        StandInEncoder.checks = number == 0  # a run of its own: hashing costs as much as all the rest
        sink = CountingSink(images.parent / f"{number}.jsonl", checkpoint.hash, len(files))
        run = CaptionRun(checkpoint, StandInEngine(spec, TOKENS), sink, RunConfig(Sampling(TOKENS)), Progress())
        await run.run(expand([str(images)]))
        if not StandInEncoder.checks:
            pipeline.append(sink.milliseconds())
        sink.close()
    return {
        "crop": size,
        "jpeg_bytes": round(statistics.mean(file.stat().st_size for file in distinct)),
        "decode_ms": round(statistics.median(decode), 2),
        "pipeline_main_ms": round(statistics.median(pipeline), 3),
        "http_main_ms": round(await http(checkpoint, spec, images, len(files)), 3),
        "crops_equal": StandInEncoder.seen == expected,
        "rounds": {"decode_ms": [round(ms, 2) for ms in decode], "pipeline_main_ms": [round(ms, 3) for ms in pipeline]},
    }


async def http(checkpoint: Checkpoint, spec: LLMSpec, images: Path, count: int) -> float:
    """Return the CPU milliseconds of the server's process for one request with one image."""
    import uvicorn

    from serve.http.admission import Admission
    from serve.http.app import Bounds
    from serve.http.auth import Keys
    from serve.http.fetch import Fetcher
    from serve.http.routes import Routes
    from serve.http.service import Service

    service = Service(checkpoint, lambda: StandInEngine(spec, TOKENS), ServiceConfig())
    routes = Routes(service, "model", Keys(), Admission(10_000), Fetcher(), Bounds(deadline=600))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(routes.app(), port=port, log_level="error"))
    await service.start()
    serving = asyncio.create_task(server.serve())
    while not service.ready or not server.started:
        await asyncio.sleep(0.1)
    command = [sys.executable, "-m", "benchmarks.serve", "--client", f"http://127.0.0.1:{port}", str(images)]
    command += ["--images", str(count), "--at-once", "64", "--max-tokens", str(TOKENS)]
    start = time.process_time()
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    stdout, _ = await client.communicate()
    spent = time.process_time() - start
    assert len(json.loads(stdout)["captions"]) == count
    server.should_exit = True
    await serving
    await service.close()
    return 1000 * spent / count


if __name__ == "__main__":
    sys.exit(main())
