"""One launch of one kernel: its arguments, its grid, and what it is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of a pointer, or divisor of a size, that lets a kernel move 16 bytes at once
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}

Argument = Tensor | int | float
Constant = int | float | bool
Grid = Callable[[dict[str, Constant]], tuple[int, ...]]  # the constants (Triton's "meta") -> blocks in x, y and z


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel."""

    kernel: str  # "window_attention.forward" is `forward` in kernels/triton/window_attention.py
    shape: str  # the class of shapes that its configuration was tuned for, such as "d32"
    grid: Grid
    args: dict[str, Argument]
    constants: dict[str, Constant]
    options: dict[str, int]  # num_warps, num_stages

    def blocks(self) -> tuple[int, int, int]:
        """Return the number of blocks in x, y and z."""
        x, y, z = (*self.grid(self.constants), 1, 1)[:3]
        return x, y, z

    def signature(self) -> dict[str, str]:
        """Return the type that each argument is compiled for, by Triton's own rules for specialisation.

        "*bf16:16" is a pointer to 16-byte aligned memory, "i32:16" a multiple of 16, "1" the constant one
        (a contiguous stride), which is no argument of the compiled kernel any more.
        """
        return {name: _compiled_as(value) for name, value in self.args.items()}

    def key(self) -> str:
        """Return the name that a build of kernels.aot is found by."""
        parts = [f"{name}={kind}" for name, kind in self.signature().items()]
        return " ".join([self.kernel, *parts, *(f"{name}={value}" for name, value in self.constants.items())])


def _compiled_as(value: Argument) -> str:
    if isinstance(value, Tensor):
        # a meta tensor stands for an allocation, and those are aligned
        aligned = value.device.type == "meta" or value.data_ptr() % ALIGNMENT == 0
        return _TYPES[value.dtype] + (f":{ALIGNMENT}" if aligned else "")
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "1"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind + (f":{ALIGNMENT}" if value % ALIGNMENT == 0 else "")
