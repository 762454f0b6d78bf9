"""What a large set of images takes: python -m benchmarks.scale --images 1e9 --gpus 64 -o benchmarks/scale.json

Measured here: what decoding a photograph costs on one core. Simulated: units of serve.ray_batch on GPUs that are taken
away at random, at rates that you give (an H200 wrote 79.7 captions a second); every assumption stands in the
output. A unit that was being worked on when its GPU went is done again by another.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import describe


@dataclass(frozen=True)
class Plan:
    """The assumptions of a simulation."""

    images: int = 1_000_000_000
    gpus: int = 64
    rate: float = 50  # images a second a GPU, steady
    unit: int = 512  # images a part
    image_kb: float = 150  # of a source file, as it is stored
    record_bytes: float = 700  # of a caption's row, compressed
    price: float = 3.0  # of a GPU's hour
    lost_after_hours: float = 24  # mean time until a GPU is taken away; 0: never
    restart_minutes: float = 8  # until another GPU is there and its models are loaded
    spread: float = 0.1  # relative standard deviation of a unit's time


def simulate(plan: Plan, seed: int = 0) -> dict:
    """One run: every unit of work, every loss of a GPU. Returns times, cost and traffic."""
    draw = random.Random(seed)
    units = -(-plan.images // plan.unit)
    seconds = plan.unit / plan.rate

    def life() -> float:
        return draw.expovariate(1 / (plan.lost_after_hours * 3600)) if plan.lost_after_hours else float("inf")

    # (when it is free, its number), and when each GPU goes
    free = [(0.0, gpu) for gpu in range(plan.gpus)]
    heapq.heapify(free)
    goes = [life() for _ in free]
    left, losses, wasted, end = units, 0, 0.0, 0.0
    while left:
        now, gpu = heapq.heappop(free)
        done = now + seconds * max(0.2, draw.gauss(1, plan.spread))
        if done > goes[gpu]:
            losses, wasted = losses + 1, wasted + goes[gpu] - now
            back = goes[gpu] + plan.restart_minutes * 60
            goes[gpu] = back + life()
            heapq.heappush(free, (back, gpu))
            continue
        left -= 1
        end = max(end, done)
        heapq.heappush(free, (done, gpu))
    ideal = plan.images / plan.rate / plan.gpus
    read = plan.images * plan.image_kb * 1e3
    return {
        "days": end / 86400,
        "over_ideal": end / ideal - 1,
        "gpu_hours": end * plan.gpus / 3600,
        "cost": end * plan.gpus / 3600 * plan.price,
        "cost_per_million": end * plan.gpus / 3600 * plan.price / plan.images * 1e6,
        "gpus_lost": losses,
        "images_done_again": wasted * plan.rate,
        "parts": units,
        "read_tb": read / 1e12,
        "written_gb": plan.images * plan.record_bytes / 1e9,
        "reads_per_second": plan.rate * plan.gpus,
        "read_gbit_per_second": plan.rate * plan.gpus * plan.image_kb * 8e3 / 1e9,
    }


def decode_seconds(count: int = 40) -> dict:
    """Seconds of a core for the crop of a 1600 x 1200 JPEG file: CPU time, which other work does not count into."""
    import numpy as np
    from PIL import Image

    from vlv.data.image import load_crop

    noise = np.random.default_rng(0).normal(128, 40, (150, 200, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    times = []
    for _ in range(count):
        start = time.process_time()
        load_crop(file.getvalue(), 384)
        times.append(time.process_time() - start)
    return {"file_kb": len(file.getvalue()) / 1e3, "seconds": sorted(times)[count // 2]}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="What a large set of images takes.")
    p.add_argument("--images", type=float, default=1e9, metavar="N", help="images (1e9)")
    p.add_argument("--gpus", type=int, default=64, metavar="N", help="GPUs at a time (64)")
    p.add_argument("--rates", default="25,50,100", help="images a second a GPU, to simulate (25,50,100)")
    p.add_argument("--price", type=float, default=3.0, metavar="X", help="of a GPU's hour (3)")
    p.add_argument("--lost-after", type=float, default=24, metavar="H", help="mean hours until a GPU is lost (24)")
    p.add_argument("--restart", type=float, default=8, metavar="MIN", help="until another works in its place (8)")
    p.add_argument("-o", "--output", type=Path, metavar="JSON", help="also write the figures")
    args = p.parse_args(argv)
    measured = decode_seconds()
    runs = []
    for rate in map(float, args.rates.split(",")):
        plan = Plan(
            int(args.images), args.gpus, rate, price=args.price, lost_after_hours=args.lost_after,
            restart_minutes=args.restart,
        )  # fmt: skip
        found = simulate(plan)
        cores = rate * measured["seconds"]
        runs.append({"assumed": asdict(plan), "found": found, "decode_cores_per_gpu": cores})
        print(
            f"{rate:5.0f}/s a GPU: {found['days']:6.1f} days, {found['gpu_hours']:9,.0f} GPU hours, cost "
            f"{found['cost']:10,.0f}, {found['gpus_lost']} GPUs lost, {found['over_ideal']:.1%} over the ideal, "
            f"{found['read_gbit_per_second']:.1f} Gbit/s read, {cores:.1f} cores decode for each GPU"
        )
    if args.output:
        command = "python -m benchmarks.scale " + " ".join(argv if argv is not None else sys.argv[1:])
        report = {"command": command, "machine": describe(), "decode": measured, "runs": runs}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
