"""Captioning at full size on one GPU, in the order of worth: python -m benchmarks.gpu.serve --budget 500

    python -m benchmarks.gpu.serve --budget 500                 # random weights of the published size
    python -m benchmarks.gpu.serve --only inline,engine         # some variants
    python -m benchmarks.gpu.serve --dry-run                    # the bundled checkpoint, on a CPU: no figure is shown

Every variant runs in a process of its own with one engine start, on JPEGs of 1024x1024 and 220 tokens a caption. Each
figure is written to the JSON file at once; a variant is not begun if the time left is less than it is known to need,
and it is ended with the budget. The variants (benchmarks/gpu/serve_variants.py): the encoder placements of
serve.vllm_caption, FP8, each half alone, and what a user would run instead. Exit code 1 where a target is missed or a
variant fails, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.kernel_measure import Budget, Report
from benchmarks.gpu.serve_variants import VARIANTS, Sizes
from benchmarks.machine import describe
from vlv.checkpoints import random_weights
from vlv.common.command import command_line
from vlv.data import scenes

ROOT = Path(__file__).resolve().parents[2]
# targets on one H200 for Qwen2.5-3B: captions a second, and times the rate of what a user would run instead
TARGETS = {"best_bf16": 150, "best_fp8": 220, "over_qwen2.5_vl": 3, "over_transformers": 5}
DISTINCT = 96  # images; the others have the same content under other names
FULL = Sizes(tokens=220, in_flight=512, more=(1024, 256), rounds=3, batch=64, stock=256, published=8)
DRY = Sizes(tokens=12, in_flight=8, more=(16,), rounds=3, batch=4, stock=0, published=2)


def main() -> int:
    """Make the inputs, run the variants, and write their figures."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="time for everything (no limit)"
    )
    p.add_argument("--preset", choices=sorted(random_weights.LLMS), default="qwen2.5-3b", help="sizes of the weights")
    p.add_argument("--ckpt", metavar="DIR", help="a checkpoint instead of random weights")
    p.add_argument("--only", metavar="NAMES", help=f"variants, of {','.join(VARIANTS)}")
    p.add_argument("--cache", type=Path, metavar="DIR", help="for what is compiled (default: a new folder)")
    p.add_argument("--dry-run", action="store_true", help="toy sizes, also on a CPU; shows no figure")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "gpu" / "serve.json", metavar="JSON")
    args = p.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        print("error: no CUDA device here: this captions at full size on a GPU (--dry-run works here)", file=sys.stderr)
        return 1
    names = args.only.split(",") if args.only else list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        p.error(f"--only: expected names of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    budget, sizes = Budget(args.budget), DRY if args.dry_run else FULL
    about = {"command": command_line("benchmarks.gpu.serve"), **describe(), "targets": TARGETS, "dry_run": args.dry_run}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    report = Report(args.output, about)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = Path(args.ckpt or (ROOT / "assets" / "vlv-tiny" if args.dry_run else work / "ckpt"))
        if not checkpoint.exists():
            random_weights.write(args.preset, checkpoint, force=True)
        write_images(work / "images", sizes.images, 256 if args.dry_run else 1024)
        report.content["preparation_s"] = round(budget.seconds - budget.left(), 1) if args.budget < 1e9 else None
        for name in names:
            needs = 0 if args.dry_run else VARIANTS[name].seconds
            if budget.allows(needs, name):
                run(name, sizes, checkpoint, work, args.cache or work / "cache", budget, report)
    summarise(report)
    if not args.dry_run:
        print(json.dumps(report.content, indent=1))
    failed = report.content.get("failed", [])
    for failure in failed:
        print(f"{failure['variant']} failed: {failure['message']}", file=sys.stderr)
    return int(bool(failed) or (bool(report.content["missed"]) and not args.dry_run))


def write_images(folder: Path, count: int, side: int) -> None:
    """Write JPEG files of held-out scenes with noise, as large as photographs are at this size."""
    folder.mkdir()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        contents = list(pool.map(lambda number: scene_jpeg(number, side, side), range(min(count, DISTINCT))))
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(contents[number % len(contents)])


def scene_jpeg(number: int, width: int, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> bytes:
    """Return a JPEG file of a held-out scene, enlarged and with noise."""
    scene = Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + number)))
    pixels = np.asarray(scene.resize((width, height), resample)).astype(np.int16)
    noise = np.random.default_rng(number).integers(-12, 13, pixels.shape, np.int16)
    file = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def run(name: str, sizes: Sizes, checkpoint: Path, work: Path, cache: Path, budget: Budget, report: Report) -> None:
    """Run one variant in a process of its own, and write each figure as it comes."""
    log = work / f"{name}.log"
    words = [name, sizes.to_json(), checkpoint.absolute(), work, cache.absolute()]
    command = [sys.executable, "-m", "benchmarks.gpu.serve_variants", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(metadata(work))])}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=env)
        ender = threading.Timer(max(1.0, min(budget.left(), 1e6)), process.terminate)
        ender.start()
        for line in process.stdout:
            if line.startswith("{"):
                report.add("figures", {"variant": name, **json.loads(line)})
        code = process.wait()
        ender.cancel()
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        what = "ended with the budget" if budget.left() < 1 else f"exit code {code}: {lines[-1] if lines else ''}"
        report.add("failed", {"variant": name, "message": what, "log": lines[-30:]})


def metadata(work: Path) -> Path:
    """Write the entry point by which vLLM finds our model, for a checkout that is not installed; return its folder."""
    folder = work / "metadata"
    about = folder / "vlv_checkout-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vlv-checkout\nVersion: 0\n")
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in plugins.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


def summarise(report: Report) -> None:
    """Add the ratios and the targets that are missed, from the figures that are there."""
    rates: dict[str, float] = {}
    for figure in report.content.get("figures", []):
        if rate := figure.get("captions_per_s"):
            rates[figure["variant"]] = max(rate, rates.get(figure["variant"], 0))
    ours = {name: rate for name, rate in rates.items() if VARIANTS[name].ours}
    found = {
        "best_bf16": max((rate for name, rate in ours.items() if "fp8" not in name), default=None),
        "best_fp8": max((rate for name, rate in ours.items() if "fp8" in name), default=None),
    }
    best = found["best_bf16"]
    for target, name in (("over_qwen2.5_vl", "qwen2.5-vl"), ("over_transformers", "transformers")):
        found[target] = best / rates[name] if best and name in rates else None
    if best and "published" in rates:
        found["over_published"] = best / rates["published"]
    report.content["summary"] = found
    report.content["missed"] = [name for name, least in TARGETS.items() if (found[name] or 0) < least]
    report.write()


if __name__ == "__main__":
    sys.exit(main())
