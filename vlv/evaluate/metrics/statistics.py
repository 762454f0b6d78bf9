"""Confidence intervals of the judgements: bootstrap over images, Wilson for shares."""

from __future__ import annotations

import numpy as np

DRAWS = 10_000
CELLS = 1_000_000
Z95 = 1.959963984540054


def bootstrap(values: list[float], seed: int = 0) -> dict[str, float]:
    """Return the mean and 95 % percentile interval over resampled images. Raises ValueError without values."""
    if not values:
        raise ValueError("no judgement to average")
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, CELLS // len(array))  # resamples at a time
    sizes = [(min(rows, DRAWS - i), len(array)) for i in range(0, DRAWS, rows)]
    means = np.concatenate([array[rng.integers(len(array), size=size)].mean(1) for size in sizes])
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "n": len(array)}


def wilson(wins: int, trials: int) -> dict[str, float | None]:
    """Return a share with its 95 % Wilson score interval (Wilson 1927); without trials no share, and from 0 to 1."""
    if not 0 <= wins <= trials:
        raise ValueError(f"{wins} wins of {trials} trials")
    if trials == 0:
        return {"mean": None, "low": 0.0, "high": 1.0, "n": 0}
    share, square = wins / trials, Z95**2 / trials
    centre = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * (share * (1 - share) / trials + square / (4 * trials)) ** 0.5
    return {"mean": share, "low": centre - half, "high": centre + half, "n": trials}
