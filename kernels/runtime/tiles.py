"""Sizes of blocks (powers of two), strides as arguments, and the dtype of sums, shared by all launchers."""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634  # kernels take powers of two


def cdiv(n: int, size: int) -> int:
    """Return n / size, rounded up."""
    return -(-n // size)


def power_of_two(n: int, min: int = 16) -> int:
    """Return the smallest power of two that is at least n and `min` (16: what a tensor core multiplies)."""
    return max(min, 1 << (n - 1).bit_length())


def two_blocks(n: int) -> dict[str, int | bool]:
    """Lay n items into a block of BLOCK_K0 and, if SECOND, one of BLOCK_K1: 144 is 128 + 16; one block wastes 112."""
    one = power_of_two(n)
    first = one // 2
    second = power_of_two(n - first) if n > first else one
    if one == 16 or second >= first:
        return {"BLOCK_K0": one, "BLOCK_K1": 16, "SECOND": False}
    return {"BLOCK_K0": first, "BLOCK_K1": second, "SECOND": True}


def strides(prefix: str, x: Tensor, axes: str) -> dict[str, int]:
    """Return the kernel arguments `prefix`_`axis` for each axis of x, in elements."""
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over x between kernels: float32, and float64 for float64 (gradcheck)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
