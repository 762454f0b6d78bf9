"""Tell what a run costs: an estimate before it starts, from a measured rate, and the account after it."""

from __future__ import annotations

import json
from pathlib import Path

PAPER_RATE = 37.0  # images a second of stage 1 on an RTX 6000 Ada: 40 M images, 2.6 epochs, 768 GPU-hours
MEASURED = Path(__file__).parents[2] / "benchmarks" / "gpu" / "train.json"


def _money(gpu_seconds: float, price: float | None) -> str:
    hours = gpu_seconds / 3600
    if price is None:
        return f"{hours:,.2f} GPU-hours (--gpu-hour USD gives the cost)"
    return f"{hours:,.2f} GPU-hours, ${hours * price:,.2f} at ${price:g} a GPU-hour"


def estimate(images: int, rate: float, processes: int, price: float | None) -> tuple[str, float]:
    """Return a sentence and the dollars (0 without a price) for `images` at `rate` a second over all processes."""
    seconds = images / rate
    text = (
        f"{images:,} images to go at {rate:,.1f} a second, measured just now on {processes} process"
        f"{'es' if processes > 1 else ''}: {seconds / 3600:,.2f} h, {_money(seconds * processes, price)}"
    )
    return text, seconds * processes / 3600 * (price or 0)


def account(images: int, seconds: float, gpu_seconds: float, price: float | None) -> str:
    """Return a sentence about what the whole run took, over all its starts."""
    rate = images / seconds if seconds else 0.0
    return f"{images:,} images in {seconds / 3600:,.2f} h, {rate:,.1f} a second: {_money(gpu_seconds, price)}"


def planned(images: int, gpus: int, price: float | None, measured: Path = MEASURED) -> str:
    """Return a sentence on stage 1's cost before anything is measured here.

    The rate is the one that benchmarks.gpu.train measured on a GPU where there is its file, else the paper's.
    """
    rate, source = PAPER_RATE, "the paper's, on RTX 6000 Ada"
    if measured.is_file():
        report = json.loads(measured.read_text())
        if "speedup" in report:
            rate, source = report["ours"]["images_per_second"], f"measured on {report['device']}"
    seconds = images / rate
    return (
        f"{images:,} images at {rate:,.1f} a second and GPU ({source}): {seconds / gpus / 3600:,.1f} h, "
        f"{_money(seconds, price)}"
    )
