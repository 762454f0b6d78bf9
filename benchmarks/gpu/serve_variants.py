"""The variants of benchmarks.gpu.serve, each in a process of its own; figures go to stdout, one JSON line each.

Captions have a fixed number of tokens whatever the model writes. A rate is that of the middle of a run: from the end of
the first captions in flight until the last ones are begun.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from serve.core.batcher import Encoder
from serve.core.inputs import expand
from serve.core.model import use_cache
from serve.core.run import CaptionRun, RunConfig
from serve.engines.base import LLMSpec, Options, Sampling
from serve.engines.vllm import VLLMEngine
from serve.outputs.jsonl import FileSink
from serve.reports.progress import Progress
from serve.reports.timeline import Timeline
from vlv.checkpoints.folder import Checkpoint
from vlv.data.image import load_crop
from vlv.model.captioner import Captioner

ENCODER_BATCH = 32
AGREEMENT = "captions.json"  # of the first variant, with which the others are compared


@dataclass(frozen=True)
class Sizes:
    """How much a variant measures."""

    tokens: int  # of a caption
    in_flight: int
    more: tuple[int, ...]  # further captions in flight, in the first variant
    rounds: int  # captions of a run, times the captions in flight
    batch: int  # of transformers
    stock: int  # images for vLLM's own model; 0: not run
    published: int  # images for the published procedure

    @property
    def images(self) -> int:
        """Return how many images the largest run needs."""
        return self.rounds * max(self.in_flight, *self.more)

    def to_json(self) -> str:
        """Return the sizes as the variant's process reads them."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Variant:
    """What is measured: `seconds` that it needs at least, `ours` if its captions are our pipeline's."""

    seconds: float
    measure: Callable[[Sizes, Checkpoint, Path], Iterator[dict]]
    ours: bool = False


class LimitedEngine(VLLMEngine):
    """An engine that stays started between runs, in which fewer captions may be in flight than it was started for."""

    limit: int | None = None

    @property
    def in_flight(self) -> int:
        return self.limit or super().in_flight

    async def start(self) -> None:
        if self._engine is None:
            await super().start()

    async def close(self) -> None:
        pass


class TimedSink(FileSink):
    """Remember when each caption was written."""

    def __init__(self, *args):
        super().__init__(*args)
        self.times: list[float] = []

    def caption(self, record: dict, item) -> None:
        super().caption(record, item)
        self.times.append(time.monotonic())


def emit(figure: dict) -> None:
    """Hand a figure to benchmarks.gpu.serve."""
    print(json.dumps(figure), flush=True)


def pipeline(options: Options, more: bool = False):
    """Return the measurement of the whole pipeline; with `more` also of other numbers in flight and of vLLM alone."""

    def measure(sizes: Sizes, checkpoint: Checkpoint, work: Path) -> Iterator[dict]:
        numbers = [sizes.in_flight, *(sizes.more if more else ())]
        engine = LimitedEngine(LLMSpec.of(checkpoint), sizes.tokens, max(numbers), options=options)
        loop = asyncio.new_event_loop()
        start = time.monotonic()
        loop.run_until_complete(engine.start())
        yield {"start_s": round(time.monotonic() - start, 1)}
        try:
            for number in numbers:
                engine.limit = number
                yield loop.run_until_complete(captions(engine, sizes, checkpoint, work, number))
                if number == sizes.in_flight and not engine.takes_crops:
                    yield loop.run_until_complete(llm_alone(engine, sizes))
        finally:
            loop.run_until_complete(VLLMEngine.close(engine))

    return measure


async def captions(engine: VLLMEngine, sizes: Sizes, checkpoint: Checkpoint, work: Path, number: int) -> dict:
    """Caption files; return the rate, how busy each stage was, and the agreement with the first variant's captions."""
    output = work / f"{time.monotonic_ns()}.jsonl"
    sink, timeline = TimedSink(output, checkpoint.hash), Timeline()
    config = RunConfig(Sampling(sizes.tokens, ignore_eos=True), ENCODER_BATCH, raw=True)
    items, images = expand([str(work / "images")]), sizes.rounds * number
    start = time.monotonic()
    await CaptionRun(checkpoint, engine, sink, config, Progress(), timeline).run(itertools.islice(items, images))
    seconds, busy = time.monotonic() - start, timeline.utilisation()
    sink.close()
    records = list(map(json.loads, output.read_text().splitlines()))
    written = {record["id"]: record["caption"] for record in records}
    assert len(written) == images and all(record["tokens"] == sizes.tokens for record in records)
    first, last = sink.times[number - 1], sink.times[-number]
    reference = work / AGREEMENT
    if not reference.exists():
        reference.write_text(json.dumps(written))
    others = json.loads(reference.read_text())
    both = [name for name in written if name in others]
    return {
        "in_flight": number,
        "captions_per_s": (images - 2 * number) / (last - first) if images > 2 * number and last > first else None,
        "captions_per_s_overall": images / seconds,
        "images": images,
        "busy": {stage: round(share, 3) for stage, share in busy.items()},
        "captions_equal": f"{sum(written[name] == others[name] for name in both)}/{len(both)}",
    }


async def llm_alone(engine: VLLMEngine, sizes: Sizes) -> dict:
    """Continue random embeddings that are there already; return captions and steps a second."""
    generator = torch.Generator().manual_seed(0)
    spec, gate = engine.spec, asyncio.Semaphore(engine.in_flight)
    embeds = torch.randn(8, spec.queries, spec.width, generator=generator)

    async def one(number: int) -> None:
        async with gate:
            await engine.generate(embeds[number % 8], Sampling(sizes.tokens, ignore_eos=True))

    count, start = 2 * engine.in_flight, time.monotonic()
    await asyncio.gather(*(one(number) for number in range(count)))
    seconds = time.monotonic() - start
    step = 1000 * seconds / (2 * sizes.tokens)
    return {"llm_alone_captions_per_s": count / seconds, "in_flight": engine.in_flight, "step_ms": step}


def encoder(sizes: Sizes, checkpoint: Checkpoint, work: Path) -> Iterator[dict]:
    """Encode batches from memory, as the pipeline does."""
    model, rng = Encoder(checkpoint, batch=ENCODER_BATCH), np.random.default_rng(0)
    size = checkpoint.config.image_size
    crops = rng.integers(0, 256, (ENCODER_BATCH, 3, size, size), np.uint8)
    for _ in range(2):
        model(crops)
    start = time.monotonic()
    for _ in range(rounds := 5):
        model(crops)
    seconds = (time.monotonic() - start) / rounds
    yield {"encoder_images_per_s": ENCODER_BATCH / seconds, "batch_ms": 1000 * seconds, "batch": ENCODER_BATCH}


def by_transformers(dtype: torch.dtype, batch: int | None, beams: int):
    """Return the measurement of transformers' generate, from files, in batches; the first one is the warm-up."""

    def measure(sizes: Sizes, checkpoint: Checkpoint, work: Path) -> Iterator[dict]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        captioner = Captioner.load(checkpoint, dtype if device == "cuda" else torch.float32).to(device)
        together = batch or sizes.batch
        rounds = 2 if batch is None else max(1, sizes.published // together)
        files = sorted((work / "images").iterdir())
        size, start = checkpoint.config.image_size, 0.0
        for number in range(rounds + 1):
            if number == 1:
                start = time.monotonic()
            part = itertools.islice(itertools.cycle(files), number * together, (number + 1) * together)
            crops = torch.from_numpy(np.stack([load_crop(file, size) for file in part])).to(device)
            captioner.generate(crops, sizes.tokens, num_beams=beams, min_new_tokens=sizes.tokens)
        seconds = time.monotonic() - start  # generate returns lists, so that the device is done
        yield {"captions_per_s": rounds * together / seconds, "batch": together, "beams": beams}

    return measure


def qwen_vl(sizes: Sizes, checkpoint: Checkpoint, work: Path) -> Iterator[dict]:
    """Caption the same files by vLLM's Qwen2.5-VL-3B with random weights, as its users do."""
    from benchmarks.gpu.qwen_vl import captions_per_second

    if sizes.stock:
        files = sorted((work / "images").iterdir())[: sizes.stock]
        yield captions_per_second(work / "qwen-vl", files, sizes.tokens, sizes.in_flight)


FP8 = {"quantization": "fp8", "cache_dtype": "fp8"}
VARIANTS = {  # in the order of worth
    "process": Variant(90, pipeline(Options(), more=True), ours=True),
    "encoder": Variant(25, encoder),
    "inline": Variant(70, pipeline(Options(placement="inline")), ours=True),
    "engine": Variant(70, pipeline(Options(placement="engine")), ours=True),
    "process-fp8": Variant(80, pipeline(Options(**FP8)), ours=True),
    "transformers": Variant(45, by_transformers(torch.bfloat16, None, 1)),
    "qwen2.5-vl": Variant(100, qwen_vl),
    "multimodal": Variant(70, pipeline(Options(placement="multimodal")), ours=True),
    "inline-fp8": Variant(80, pipeline(Options(placement="inline", **FP8)), ours=True),
    "published": Variant(60, by_transformers(torch.float32, 2, 4)),
}


def main() -> None:
    """Measure one variant: NAME SIZES CHECKPOINT WORK CACHE, as benchmarks.gpu.serve calls it."""
    name, sizes, checkpoint, work, cache = sys.argv[1:]
    use_cache(Path(cache))
    values = json.loads(sizes)
    measured = VARIANTS[name].measure(Sizes(**values), Checkpoint.open(checkpoint), Path(work))
    for figure in measured:
        emit(figure)


if __name__ == "__main__":
    main()
