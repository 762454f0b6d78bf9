"""Tell what a run costs: an estimate before it starts, from a measured rate, and the account after it."""

from __future__ import annotations


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
