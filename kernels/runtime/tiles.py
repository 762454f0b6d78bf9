"""What launchers share: lengths laid into tiles, whose sides are powers of two, strides, and the dtype of sums."""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634  # kernels take powers of two


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds n, and is at least `least` (16: what a tensor core multiplies)."""
    return max(least, 1 << (n - 1).bit_length())


def two_tiles(n: int) -> dict[str, int | bool]:
    """n items as a tile MAIN and, if SECOND, one of REST behind it: 144 is 128 + 16, where one tile wastes 112."""
    one = power_of_two(n)
    main = one // 2
    rest = power_of_two(n - main) if n > main else one
    if one == 16 or rest >= main:
        return {"MAIN": one, "REST": 16, "SECOND": False}
    return {"MAIN": main, "REST": rest, "SECOND": True}


def strides(prefix: str, x: Tensor, axes: str) -> dict[str, int]:
    """Kernel arguments `prefix`_`axis` for each axis of x."""
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are kept in between kernels: float32; float64 for gradcheck, which asks for it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
